"""From settings to the command lines of the processes."""

from __future__ import annotations

from pathlib import Path

from wint2.settings import ServeSettings
from wint2.stack import plan_stack, used_ports


def settings(**values: object) -> ServeSettings:
    return ServeSettings(model=Path("/m"), _cli_parse_args=False, **values)


def test_the_services_find_one_another():
    stack = plan_stack(settings(), Path("/run/x"))
    assert stack.tokenizer.address == "unix:/run/x/tokenizer.sock"
    assert flag(stack.gateway.command, "--tokenizer") == stack.tokenizer.address
    assert flag(stack.workers[0].command, "--scheduler") == stack.grpc_address == "127.0.0.1:8182"
    assert stack.workers[0].address == "unix:/run/x/worker.sock"
    assert (stack.http_url, stack.metrics_url) == ("http://127.0.0.1:8180", "http://127.0.0.1:8180/metrics")


def test_what_is_not_given_is_left_to_the_service():
    command = plan_stack(settings(max_num_seqs=3), Path("/run/x")).workers[0].command
    assert flag(command, "--max-num-seqs") == "3"
    assert "--max-model-len" not in command


def test_switches_go_through_both_ways():
    stack = plan_stack(settings(use_cudagraph=False), Path("/run/x"))
    assert "--no-use-cudagraph" in stack.workers[0].command
    assert "--enable-prefix-caching" in stack.workers[0].command


def test_the_default_grpc_port_steps_aside():
    ports = used_ports(settings(engine_worker_queue_port=8182, metrics_port=8183))
    assert ports == {
        "--port": 8180,
        "--metrics-port": 8183,
        "--engine-worker-queue-port": 8182,
        "--grpc-port": 8184,
    }


def test_metrics_on_the_http_port_need_no_second_one():
    assert "--metrics-port" not in used_ports(settings(metrics_port=8180))


def test_each_worker_has_its_own_gpus_and_port():
    options = settings(data_parallel_size=2, tensor_parallel_size=2, engine_worker_queue_port=9000)
    workers = plan_stack(options, Path("/run/x")).workers
    assert [worker.address for worker in workers] == ["127.0.0.1:9000", "127.0.0.1:9001"]
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0,1", "2,3"]
    assert used_ports(options)["--engine-worker-queue-port + 1"] == 9001


def test_api_keys_stay_off_the_command_line():
    gateway = plan_stack(settings(api_key=("one", "two")), Path("/run/x")).gateway
    assert gateway.environment == {"WINT2_GATEWAY_API_KEY": "one,two"}
    assert "one" not in " ".join(gateway.command)


def flag(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_tls_reaches_every_service_and_https_the_gateway():
    files = {"tls_cert": Path("/c"), "tls_key": Path("/k"), "tls_ca": Path("/a"), "tls_client_auth": True}
    https = {"http_tls_cert": Path("/hc"), "http_tls_key": Path("/hk")}
    stack = plan_stack(settings(**files, **https), Path("/run/x"))
    for service in stack.services:
        assert flag(service.command, "--tls-cert") == "/c"
        assert flag(service.command, "--tls-key") == "/k"
        assert flag(service.command, "--tls-ca") == "/a"
        assert "--tls-client-auth" in service.command
    assert flag(stack.gateway.command, "--http-tls-cert") == "/hc"
    assert stack.http_url == "https://127.0.0.1:8180"
    assert stack.metrics_url == "https://127.0.0.1:8180/metrics"
