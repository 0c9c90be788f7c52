"""Locust's users: most leave in the middle of an answer, some stay to its end."""

import random

from locust import HttpUser, between, task

LONG = {"max_tokens": 1000, "ignore_eos": True, "stream": True}
SHORT = {"max_tokens": 8, "ignore_eos": True}


class Restless(HttpUser):
    wait_time = between(0.0, 0.2)

    @task(4)
    def leaves(self):
        body = {"prompt": f"storm {random.random()}", **LONG}
        with self.client.post(
            "/v1/completions", json=body, stream=True, catch_response=True, name="leaves"
        ) as answer:
            patience = random.randrange(12)
            for number, line in enumerate(answer.iter_lines()):
                if number > patience:
                    break
                if b'"error"' in line:
                    answer.failure(line.decode())
            answer.close()

    @task(1)
    def stays(self):
        body = {"prompt": f"calm {random.random()}", **SHORT}
        with self.client.post("/v1/completions", json=body, catch_response=True, name="stays") as answer:
            usage = answer.json().get("usage", {})
            if usage.get("completion_tokens") != SHORT["max_tokens"]:
                answer.failure(answer.text)
