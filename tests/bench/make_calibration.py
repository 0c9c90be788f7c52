"""Writes gpu_worker/quantizer/calibration.txt: prose, dialogue, code and lists that the demo's source model
itself samples.

A model's own samples are the text it was trained to expect, free of anyone's copyright, and apart from every
held-out text. Run: PYTHONPATH=. python tests/bench/make_calibration.py CACHE_DIRECTORY
"""

import re
import sys
from pathlib import Path

import torch

from tests.wint2.dense_reference import load_llama
from wint2.demo import tokenizer as demo_tokenizer
from wint2.demo.source import DenseModel, fetch

OUTPUT = Path(__file__).parents[2] / "gpu_worker" / "quantizer" / "calibration.txt"
MAX_NEW_TOKENS = 340
BATCH = 24

SUBJECTS = [
    "the water cycle",
    "how bread is baked",
    "the Roman Empire",
    "photosynthesis",
    "the stock market",
    "a lighthouse keeper",
    "learning the violin",
    "the human heart",
    "planting tomatoes",
    "the periodic table",
    "a lost dog",
    "volcanoes",
    "writing a cover letter",
    "the French Revolution",
    "black holes",
    "a train journey",
    "vaccines",
    "bicycle repair",
    "democracy",
    "coral reefs",
    "the printing press",
    "a detective in the rain",
    "sorting algorithms",
    "meditation",
    "the Amazon rainforest",
    "earthquakes",
    "a birthday party",
    "renewable energy",
    "chess openings",
    "the moon landing",
    "making cheese",
    "ancient Egypt",
    "probability",
    "a storm at sea",
    "healthy sleep",
    "the history of jazz",
    "supply and demand",
    "bees",
    "a letter to a friend",
    "how computers store numbers",
    "glaciers",
    "Shakespeare's plays",
    "the immune system",
    "carpentry",
    "a job interview",
    "rivers of Asia",
    "electric motors",
    "fairy tales",
]
STYLES = [
    "{subject} is",
    "<|im_start|>user\nTell me about {subject}.<|im_end|>\n<|im_start|>assistant\n",
    "Chapter 1: An introduction to {subject}\n\n",
    "<|im_start|>user\nWrite a short story involving {subject}.<|im_end|>\n<|im_start|>assistant\n",
    "Question: What are the most important facts about {subject}?\nAnswer:",
    "<|im_start|>user\nWrite a Python function connected with {subject}.<|im_end|>\n<|im_start|>assistant\n",
]


def main() -> None:
    torch.manual_seed(0)
    dense = DenseModel.open(fetch(Path(sys.argv[1])))
    tokenizer, model = demo_tokenizer.build(dense.fields), load_llama(dense)
    tokenizer.enable_padding(direction="left", pad_id=2, pad_token="<|im_end|>")
    prompts = [STYLES[i % len(STYLES)].format(subject=s) for i, s in enumerate(SUBJECTS + SUBJECTS[1:])]
    pieces = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer.encode_batch(prompts[start : start + BATCH])
        ids, mask = (torch.tensor([getattr(e, part) for e in batch]) for part in ("ids", "attention_mask"))
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True, "temperature": 0.9, "top_p": 0.97}
        out = model.generate(input_ids=ids, attention_mask=mask, **options)
        pieces += [_text(tokenizer, row.tolist()) for row in out]
        OUTPUT.write_text("\n\n".join(pieces) + "\n", encoding="utf-8")
        print(f"{len(pieces)} of {len(prompts)} samples", flush=True)


def _text(tokenizer: demo_tokenizer.Tokenizer, ids: list[int]) -> str:
    """One sample without its padding on either side."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return re.sub(r"^(<\|im_end\|>)+|(?<=<\|im_end\|>)(<\|im_end\|>)+", "", text).strip("\n")


if __name__ == "__main__":
    main()
