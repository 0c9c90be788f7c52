"""The service over a real socket."""

import asyncio

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from protos.rpc.errors import InvalidArgumentError, from_rpc_error
from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from protos.wint2.tokenizer.v1 import tokenizer_pb2_grpc
from tests.fakes import connected, tokenizer_service
from tests.tokenizer_svc.folders import ENDLESS, HARD_STRINGS
from tokenizer_svc.detokenizer import IncrementalDetokenizer
from tokenizer_svc.servicer import TokenizerServicer
from tokenizer_svc.settings import RequestLimits
from tokenizer_svc.template_pool import TemplateLimits
from tokenizer_svc.tokenizer import load_tokenizer

LIMITS = RequestLimits(
    max_texts=100, max_text_bytes=100_000, max_sessions=3, max_stop_strings=2, max_stop_chars=9
)


@pytest.fixture
async def stub(tokenizer):
    servicer = TokenizerServicer(tokenizer, LIMITS, num_threads=2, num_renderers=1)
    async with connected(tokenizer_service(servicer)) as channel:
        yield tokenizer_pb2_grpc.TokenizerServiceStub(channel)


async def error_of(call) -> InvalidArgumentError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    mapped = from_rpc_error(error.value)
    assert isinstance(mapped, InvalidArgumentError)
    return mapped


def message(**fields) -> Struct:
    return ParseDict(fields, Struct())


def chunk(session_id, ids=(), *, end=False, options=None) -> pb.DetokenizeChunk:
    return pb.DetokenizeChunk(
        session_id=session_id,
        token_ids=ids,
        end=end,
        options=None if options is None else pb.DetokenizeOptions(**options),
    )


async def exchange(call, *chunks) -> list[pb.DetokenizePiece]:
    await call.write(pb.DetokenizeRequest(chunks=chunks))
    response = await call.read()
    assert [piece.session_id for piece in response.pieces] == [item.session_id for item in chunks]
    return list(response.pieces)


async def test_fixed_texts(stub, tokenizer):
    response = await stub.GetTokenTexts(pb.GetTokenTextsRequest())
    assert list(response.texts) == tokenizer.vocabulary.fixed_texts()
    call = stub.Detokenize()
    for session_id, text in enumerate(("a", "a🧿")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = ids if text == "a" else ids[:-1]
        [piece] = await exchange(call, chunk(session_id, ids, options={}))
        assert piece.settled == IncrementalDetokenizer(tokenizer).push(ids).settled


async def test_tokenize(stub, tokenizer):
    response = await stub.Tokenize(pb.TokenizeRequest(texts=HARD_STRINGS))
    assert [list(ids.ids) for ids in response.token_ids] == tokenizer.encode_batch(HARD_STRINGS)
    response = await stub.Tokenize(
        pb.TokenizeRequest(texts=["<|im_end|>"], add_special_tokens=False, parse_special_tokens=True)
    )
    assert len(response.token_ids[0].ids) == 1
    assert not (await stub.Tokenize(pb.TokenizeRequest())).token_ids


async def test_tokenize_limits(stub):
    error = await error_of(stub.Tokenize(pb.TokenizeRequest(texts=["x"] * 101)))
    assert (error.field, error.message) == ("texts", "101 texts; the limit is 100")
    error = await error_of(stub.Tokenize(pb.TokenizeRequest(texts=["x" * 100_001])))
    assert error.field == "texts"
    assert "the limit is 100000" in error.message


async def test_apply_chat_template(stub, tokenizer):
    conversation = [{"role": "user", "content": "Hi <|im_end|> 你好"}]
    response = await stub.ApplyChatTemplate(
        pb.ApplyChatTemplateRequest(messages=[message(**turn) for turn in conversation])
    )
    assert (response.text, list(response.token_ids.ids)) == tokenizer.apply_chat_template(conversation)


async def test_template_of_the_request(stub):
    request = pb.ApplyChatTemplateRequest(
        messages=[message(role="user", content=[{"n": 3, "f": 0.5, "none": None, "yes": True}])],
        tools_json=['{"name": "f", "a": 1.0}'],
        template_kwargs=message(mode="fast"),
        chat_template="{{ messages[0].content | tojson }} {{ tools }} {{ mode }} {{ add_generation_prompt }}",
        add_generation_prompt=False,
    )
    text = (await stub.ApplyChatTemplate(request)).text
    assert text == """[{"f": 0.5, "n": 3, "none": null, "yes": true}] [{'name': 'f', 'a': 1.0}] fast False"""


@pytest.mark.parametrize(
    ("request_fields", "field", "words"),
    [
        ({}, "messages", "at least one message"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", 'no "role"'),
        ({"messages": [{"role": "user"}, {"role": 1}]}, "messages[1].role", 'no "role"'),
        ({"messages": [{"role": "user"}], "chat_template": "\n{{ x.y }}"}, "chat_template", "line 2: 'x' is"),
        ({"messages": [{"role": "x" * 100_001}]}, "messages", "the limit is 100000"),
        ({"messages": [{"role": "user"}], "toolsJson": ["{}", "{"]}, "tools_json[1]", "not valid JSON"),
        ({"messages": [{"role": "user"}], "toolsJson": ["[]"]}, "tools_json[0]", "no JSON object"),
        (
            {"messages": [{"role": "user"}], "template_kwargs": {"tools": 1}},
            "template_kwargs.tools",
            "a field of its own",
        ),
    ],
)
async def test_conversations_that_cannot_be_rendered(stub, request_fields, field, words):
    request = ParseDict(request_fields, pb.ApplyChatTemplateRequest())
    error = await error_of(stub.ApplyChatTemplate(request))
    assert error.field == field
    assert words in error.message


async def test_info(stub, tokenizer):
    response = await stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest())
    assert response.kind == tokenizer.info.kind
    assert response.vocab_size == tokenizer.info.vocab_size
    assert tuple(response.eos_token_ids) == tokenizer.info.eos_token_ids
    assert response.HasField("bos_token_id") == (tokenizer.info.bos_token_id is not None)
    assert response.chat_template == tokenizer.info.chat_template


async def test_sessions_share_a_stream(stub, tokenizer):
    texts = ["The quick brown fox", "It was the best of times"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    call = stub.Detokenize()
    seen = ["", ""]
    for step in range(max(map(len, ids))):
        pieces = await exchange(
            call,
            *(
                chunk(n, [ids[n][step]], options={} if step == 0 else None)
                for n in (0, 1)
                if step < len(ids[n])
            ),
        )
        for piece in pieces:
            seen[piece.session_id] += piece.text
            assert piece.num_tokens == step + 1
    for piece in await exchange(call, chunk(0, end=True), chunk(1, end=True)):
        seen[piece.session_id] += piece.text
        assert piece.finished
    assert seen == texts
    await call.done_writing()
    assert await call.read() == grpc.aio.EOF


async def test_a_stop_string_ends_its_session(stub, tokenizer):
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    call = stub.Detokenize()
    (piece,) = await exchange(call, chunk(7, ids, options={"stop": ["k b"], "include_stop": True}))
    assert (piece.text, piece.matched_stop, piece.finished) == ("The quick b", "k b", True)
    assert 0 < piece.num_tokens <= len(ids)
    (piece,) = await exchange(call, chunk(7, ids, options={}))
    assert (piece.text, piece.finished) == ("The quick brown fox", False)


async def test_what_is_wrong_with_a_session_ends_no_other(stub, tokenizer):
    ids = tokenizer.encode("The quick", add_special_tokens=False)
    call = stub.Detokenize()
    pieces = await exchange(
        call,
        chunk(1, ids, options={}),
        chunk(2, ids),
        chunk(3, ids, options={"stop": [""]}),
        chunk(4, ids, options={"stop": ["a", "b", "c"]}),
        chunk(5, options={"stop": ["0123456789"]}),
        chunk(6, options={}),
        chunk(7, options={}),
        chunk(8, options={}),
    )
    assert pieces[0].text == "The quick"
    assert [piece.finished for piece in pieces] == [False, True, True, True, True, False, False, True]
    assert [piece.error_message for piece in pieces] == [
        "",
        "session 2 is not open, and options are missing",
        "a stop string has 1 to 9 characters, this one 0",
        "3 stop strings; the limit is 2",
        "a stop string has 1 to 9 characters, this one 10",
        "",
        "",
        "3 sessions are open on this stream, which is the limit",
    ]
    (again, other) = await exchange(call, chunk(1, options={}), chunk(6, ids, end=True))
    assert again.error_message == "session 1 is open already, with other options"
    assert (other.text, other.finished) == ("The quick", True)


async def test_a_long_chunk(stub, tokenizer):
    ids = tokenizer.encode("The quick", add_special_tokens=False) * 3000
    call = stub.Detokenize()
    (piece,) = await exchange(call, chunk(1, ids, options={}, end=True))
    assert piece.text == tokenizer.decode(ids)
    assert piece.num_tokens == len(ids)


async def test_a_slow_template_delays_nobody(folders):
    tokenizer = load_tokenizer(folders["byte_level"], limits=TemplateLimits(cpu_seconds=1))
    servicer = TokenizerServicer(tokenizer, LIMITS, num_threads=1, num_renderers=1)
    async with connected(tokenizer_service(servicer)) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        request = pb.ApplyChatTemplateRequest(messages=[message(role="user")], chat_template=ENDLESS)
        slow = asyncio.ensure_future(stub.ApplyChatTemplate(request))
        await asyncio.sleep(0.2)
        for _ in range(20):
            await stub.Tokenize(pb.TokenizeRequest(texts=["x"]))
        assert not slow.done()
        assert "ran for more than" in (await error_of(slow)).message
