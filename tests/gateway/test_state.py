"""What the gateway says of itself: models, health, metrics, version, and an OpenAPI document that is true."""

from __future__ import annotations

import logging
import re

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rpc.channel import open_channel
from protos.rpc.errors import from_rpc_error
from protos.wint2.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from tests.gateway.harness import MODEL, Stack, serving_stack, stack, worker


async def test_models(stack: Stack) -> None:
    [model] = [model async for model in stack.openai.models.list()]
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 4096)
    assert (await stack.openai.models.retrieve(MODEL)).id == MODEL


async def test_no_models_without_workers() -> None:
    async with stack() as made:
        assert (await made.http.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_version(stack: Stack) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", (await stack.http.get("/version")).json()["version"])


async def test_metrics_count_what_was_served(stack: Stack) -> None:
    await stack.complete("hi")
    await stack.complete("hi", stream=True)
    await stack.complete("")
    text = (await stack.http.get("/metrics")).text
    values = dict(re.findall(r"^(wint2_gateway_\S+) (\S+)$", text, re.MULTILINE))
    assert values["wint2_gateway_prompt_tokens_total"] == "4.0"
    assert values["wint2_gateway_time_to_first_token_seconds_count"] == "2.0"
    assert values['wint2_gateway_request_success_total{finished_reason="stop"}'] == "2.0"
    assert values['wint2_gateway_http_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert values["wint2_gateway_num_requests_in_flight"] == "0.0"


async def test_grpc_health_is_readiness(stack: Stack) -> None:
    async with open_channel(stack.gateway.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_grpc_calls_need_the_key_too() -> None:
    async with (
        serving_stack(api_key=("secret",)) as (made, _),
        open_channel(made.gateway.grpc_address) as channel,
    ):
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(gateway_pb2.ListModelsRequest())
        assert from_rpc_error(caught.value).reason == "INVALID_API_KEY"
        metadata = (("authorization", "Bearer secret"),)
        assert (await stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=metadata)).models


async def test_keys_of_a_file_change_without_a_restart(tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\nold\n")
    async with serving_stack(api_key_file=path) as (made, _):
        assert (await made.http.get("/v1/models", headers=bearer("old"))).status_code == 200
        path.write_text("newer\n")
        assert (await made.http.get("/v1/models", headers=bearer("old"))).status_code == 401
        assert (await made.http.get("/v1/models", headers=bearer("newer"))).status_code == 200


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_keys_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving_stack(api_key=("s3cret-key",)) as (made, _):
        await made.http.get("/v1/models", headers=bearer("s3cret-key"))
        await made.http.get("/v1/models", headers=bearer("wr0ng-key"))
    messages = [
        record.getMessage() for record in caplog.records if record.name.startswith(("gateway", "protos"))
    ]
    assert any("/v1/models" in message for message in messages)
    assert not any("s3cret" in message or "wr0ng" in message for message in messages)


async def test_cors_is_off_by_default_and_can_be_on() -> None:
    origin = {"origin": "https://example.org"}
    async with stack() as closed, stack(allow_origin=("https://example.org",)) as opened:
        assert (
            "access-control-allow-origin" not in (await closed.http.get("/version", headers=origin)).headers
        )
        answer = await opened.http.get("/version", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"


async def test_the_openapi_document_lists_what_is_answered(stack: Stack) -> None:
    document = (await stack.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        assert "422" not in str(operations)
        for method, operation in operations.items():
            if "{" not in path:
                response = await stack.http.request(method, path)
                assert str(response.status_code) in operation["responses"], path
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["required"] == ["messages"]
    assert chat["additionalProperties"] is False


async def test_two_workers_of_one_model_are_one_entry(stack: Stack) -> None:
    async with worker(stack):
        [model] = (await stack.http.get("/v1/models")).json()["data"]
        assert model["num_workers"] == 2
