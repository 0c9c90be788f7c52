"""Writes gpu_worker/quantizer/calibration.txt: documents and chats that the demo's source model samples.

A model's own samples at temperature 1 are text it was trained to expect, free of anyone's copyright, and
apart from every held-out text. A document begins with any capitalized word of the vocabulary, a chat with the
system line alone, so that the model writes the question too. What holds the prompt of a fact is left out.
The file that ships was sampled so on a GPU; another machine draws other samples.
Run: PYTHONPATH=. python tests/bench/make_calibration.py CACHE_DIRECTORY
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tests.bench.bench_quality import FACTS
from tests.wint2.dense_reference import load_llama
from wint2.demo import tokenizer as demo_tokenizer
from wint2.demo.source import DenseModel, fetch

OUTPUT = Path(__file__).parents[2] / "gpu_worker" / "quantizer" / "calibration.txt"
NUM_DOCUMENTS, NUM_CHATS, NUM_TOKENS, BATCH = 168, 56, 320, 56
LEAST_CHARACTERS = 200
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
END = "<|endoftext|>"


def main() -> None:
    torch.manual_seed(0)
    dense = DenseModel.open(fetch(Path(sys.argv[1])))
    tokenizer, model = demo_tokenizer.build(dense.fields), load_llama(dense)
    facts = [line.split("\t")[0].lower() for line in FACTS.read_text(encoding="utf-8").splitlines()]
    pieces: list[str] = []
    for opening in openings(tokenizer):
        out = model.generate(
            input_ids=opening, attention_mask=torch.ones_like(opening), do_sample=True, temperature=1.0,
            top_k=0, max_new_tokens=NUM_TOKENS, eos_token_id=tokenizer.token_to_id(END),
        )  # fmt: skip
        texts = [text(tokenizer, row.tolist()) for row in out]
        pieces += [t for t in texts if len(t) > LEAST_CHARACTERS and not any(f in t.lower() for f in facts)]
        OUTPUT.write_text("\n\n".join(pieces) + "\n", encoding="utf-8")
        print(f"{len(pieces)} samples", flush=True)


def openings(tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Token ids [BATCH, T] to go on from."""
    end = tokenizer.token_to_id(END)
    words = [index for word, index in tokenizer.get_vocab().items() if word.isalpha() and word.istitle()]
    for _ in range(NUM_DOCUMENTS // BATCH):
        chosen = torch.tensor(words)[torch.randint(len(words), (BATCH, 1))]
        yield torch.cat([torch.full_like(chosen, end), chosen], dim=1)
    for _ in range(NUM_CHATS // BATCH):
        yield torch.tensor(tokenizer.encode(CHAT).ids).repeat(BATCH, 1)


def text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """One sample up to its end; no halves of characters."""
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    return whole.removeprefix(END).split(END)[0].replace("\ufffd", "").strip()


if __name__ == "__main__":
    main()
