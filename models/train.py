"""How were the bundled models made, and how good are they?

    python models/train.py --out models/baton-small --size small --minutes 60
    python models/train.py --evaluate models/baton-small

Needs torch, transformers, tokenizers and safetensors. Training stops when its wall-clock budget is
spent and always ends annealed: the learning rate is a function of the share of the budget used. A
run that is cut off goes on from its last checkpoint when the same command is given again.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from chat import Message, Pair, conversations, pairs_from, training_pairs
from corpus import Document, c_docstrings, source_documents, topic_documents
from safetensors.torch import save_file
from tokenizer import (
    BOS,
    END,
    EOS,
    MAX_TOKENS,
    PAD,
    SPECIAL_TOKENS,
    VOCAB_TOKENS,
    save_tokenizer,
    train_tokenizer,
)
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SEED = 20
STEP_TOKENS = 4096
SHORT_TOKENS, LONG_TOKENS = 512, 2048
LONG_FROM = 0.85
"""Share of the budget after which sequences are `LONG_TOKENS` long."""
WARMUP, DECAY_FROM = 0.02, 0.5
_MARKERS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
CHECKPOINT_EVERY_S = 120.0
LOG_EVERY_S = 30.0


@dataclass(frozen=True)
class Size:
    """The shape of a model; widths in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


SIZES = {
    "small": Size(hidden=256, layers=6, heads=8, kv_heads=4, head_dim=32, ffn=704),
    "tiny": Size(hidden=96, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256),
}


@dataclass(frozen=True)
class Evaluation:
    """Loss on held-out text: nats summed over all predicted `tokens`.

    `text_bytes` is the text's size in UTF-8 without special tokens, whose loss does count.
    """

    nats: float
    tokens: int
    text_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.nats / self.tokens:.3f} nats/token, "
            f"{self.nats / math.log(2) / self.text_bytes:.3f} bits/byte "
            f"({self.tokens} tokens, {self.text_bytes} bytes)"
        )


@dataclass(frozen=True)
class Corpus:
    """The documents, parted once into what is trained on and what is only measured."""

    prose: tuple[Document, ...]
    """Trained on as plain text: sources and the language reference."""
    asked: tuple[Document, ...]
    """Trained on as conversations: all of the above and the docstrings of C functions."""
    held_out_prose: tuple[Document, ...]
    held_out_asked: tuple[Document, ...]

    @staticmethod
    def read() -> "Corpus":
        """Read it from the running interpreter's standard library."""
        prose = source_documents() + topic_documents()
        asked = prose + c_docstrings()
        return Corpus(
            prose=tuple(document for document in prose if not document.held_out),
            asked=tuple(document for document in asked if not document.held_out),
            held_out_prose=tuple(document for document in prose if document.held_out),
            held_out_asked=tuple(document for document in asked if document.held_out),
        )


@dataclass
class Progress:
    """Where a run stands; saved in its checkpoints. `spent_s` counts training time alone."""

    spent_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    epoch: int = 0
    windows_done: int = 0
    """Windows of the current epoch that were already trained on."""
    window_tokens: int = SHORT_TOKENS


class Windows:
    """Endless batches of token ids, every epoch in a new order and with new conversations."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._prose = _encode(tokenizer, [f"{BOS}{d.text}{EOS}" for d in corpus.prose])
        self._pairs = training_pairs(corpus.asked)

    def batches(self, progress: Progress) -> Iterator[Tensor]:
        """Batches of int64 `[STEP_TOKENS / window_tokens, window_tokens + 1]`.

        Goes on from `progress` and keeps it current. A caller that changes
        `progress.window_tokens` gets the new length from the next epoch, which begins at once.
        """
        while True:
            length = progress.window_tokens
            windows = self._epoch(progress.epoch, length)
            rows = STEP_TOKENS // length
            while progress.windows_done + rows <= len(windows):
                start = progress.windows_done
                progress.windows_done += rows
                yield windows[start : start + rows]
                if progress.window_tokens != length:
                    break
            progress.epoch += 1
            progress.windows_done = 0

    def _epoch(self, epoch: int, length: int) -> Tensor:
        rng = random.Random(f"{SEED}/{epoch}")
        chats = [_render(self._tokenizer, turns) for turns in conversations(self._pairs, rng)]
        parts = self._prose + _encode(self._tokenizer, chats)
        rng.shuffle(parts)
        stream = np.concatenate(parts)
        # A random start moves the window borders from one epoch to the next.
        stream = stream[rng.randrange(length) :]
        count = (len(stream) - 1) // length
        starts = np.array(rng.sample(range(count), count)) * length
        rows = stream[starts[:, None] + np.arange(length + 1)]
        return torch.from_numpy(rows.astype(np.int64))


def _render(tokenizer: PreTrainedTokenizerFast, turns: list[Message]) -> str:
    text = tokenizer.apply_chat_template([asdict(turn) for turn in turns], tokenize=False)
    return f"{text}{EOS}"


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]


def learning_rate_share(budget_share: float) -> float:
    """The share of the peak learning rate at `budget_share` in [0, 1]: warm up, hold, decay to 0."""
    if budget_share < WARMUP:
        return max(budget_share, WARMUP / 10) / WARMUP
    return min(1.0, max(0.0, (1.0 - budget_share) / (1.0 - DECAY_FROM)))


def train(out: Path, size_name: str, minutes: float, tokenizer_folder: Path | None) -> None:
    """Train `size_name` for `minutes` of wall-clock time and write the folder `out`."""
    torch.manual_seed(SEED)
    corpus = Corpus.read()
    out.mkdir(parents=True, exist_ok=True)
    _provide_tokenizer(out, tokenizer_folder, corpus)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    write_configs(out, SIZES[size_name])
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(out))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = _optimizers(model)
    progress = Progress()
    checkpoint = Path(__file__).parent / ".train" / f"{out.name}.pt"
    if checkpoint.exists():
        progress = _resume(checkpoint, model, optimizers)
        print(f"resumed after {progress.steps} steps, {progress.spent_s:.0f} s", flush=True)
    _run(model, optimizers, Windows(corpus, tokenizer), progress, minutes * 60, checkpoint)
    write_weights(out, model)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {out} after {progress.steps} steps, {progress.tokens:,} tokens", flush=True)


def _run(
    model: LlamaForCausalLM,
    optimizers: tuple[torch.optim.Optimizer, ...],
    windows: Windows,
    progress: Progress,
    budget_s: float,
    checkpoint: Path,
) -> None:
    compiled = torch.compile(_losses, dynamic=False)
    peaks = [group["initial_lr"] for optimizer in optimizers for group in optimizer.param_groups]
    batches = windows.batches(progress)
    saved_s = logged_s = progress.spent_s
    since_log: list[float] = []
    while progress.spent_s < budget_s:
        started = time.monotonic()
        share = progress.spent_s / budget_s
        progress.window_tokens = LONG_TOKENS if share >= LONG_FROM else SHORT_TOKENS
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_share(share)
        # Compiling makes a step 1.7 times as fast and costs as much time as some 50 of them, more than
        # the few long ones give back.
        losses = compiled if progress.window_tokens == SHORT_TOKENS else _losses
        since_log.append(_step(model, optimizers, losses, next(batches)))
        progress.steps += 1
        progress.tokens += STEP_TOKENS
        progress.spent_s += time.monotonic() - started
        if progress.spent_s - logged_s >= LOG_EVERY_S:
            print(
                f"{progress.spent_s:5.0f} s  step {progress.steps}  epoch {progress.epoch}  "
                f"{progress.tokens / progress.spent_s:.0f} tokens/s  "
                f"loss {sum(since_log) / len(since_log):.3f} nats/token",
                flush=True,
            )
            logged_s, since_log = progress.spent_s, []
        if progress.spent_s - saved_s >= CHECKPOINT_EVERY_S:
            _save(checkpoint, model, optimizers, progress)
            saved_s = progress.spent_s


def _step(
    model: LlamaForCausalLM,
    optimizers: tuple[torch.optim.Optimizer, ...],
    losses: Callable[[LlamaForCausalLM, Tensor], Tensor],
    batch: Tensor,
) -> float:
    """One update; returns the batch's mean loss in nats per token."""
    loss = losses(model, batch).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Loss of each predicted token, fp32 `[rows * (width - 1)]`, for `batch` of `[rows, width]`."""
    # bf16 matrix products are 1.4-1.6 times as fast as fp32 ones on processors with AVX512-BF16.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")


def _optimizers(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _save(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: tuple[torch.optim.Optimizer, ...],
    progress: Progress,
) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "progress": asdict(progress),
        },
        partial,
    )
    # A rename is atomic: a run that is cut off while it writes keeps its previous checkpoint.
    partial.replace(path)


def _resume(path: Path, model: LlamaForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...]) -> Progress:
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Progress(**saved["progress"])


def _provide_tokenizer(out: Path, source: Path | None, corpus: Corpus) -> None:
    """Keep the tokenizer that `out` has, else copy `source`'s, else train one."""
    if (out / "tokenizer.json").exists():
        return
    if source is None:
        texts = [document.text for document in corpus.prose]
        texts += [pair.answer for pair in training_pairs(corpus.asked)]
        save_tokenizer(train_tokenizer(texts), out)
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())


def write_configs(out: Path, size: Size) -> None:
    """Write `config.json` and `generation_config.json`."""
    bos, eos, pad, end = (SPECIAL_TOKENS.index(token) for token in (BOS, EOS, PAD, END))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_TOKENS,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": bos,
        "eos_token_id": [eos, end],
        "pad_token_id": pad,
        "use_cache": True,
    }
    generation = {"bos_token_id": bos, "eos_token_id": [eos, end], "pad_token_id": pad}
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_weights(out: Path, model: LlamaForCausalLM) -> None:
    """Write `model.safetensors` in bf16; the output head is the embedding and is left out."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = out / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file lets nobody but the owner read it


@torch.inference_mode()
def evaluate(folder: Path) -> None:
    """Print the loss of the saved model, in fp32, on text and on conversations it never saw."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    corpus = Corpus.read()
    prose = [f"{BOS}{document.text}{EOS}" for document in corpus.held_out_prose]
    pairs: list[Pair] = [p for document in corpus.held_out_asked for p in pairs_from(document)]
    chats = [_render(tokenizer, turns) for turns in conversations(pairs, random.Random(SEED))]
    for window in (SHORT_TOKENS, LONG_TOKENS, 2 * LONG_TOKENS):
        print(f"held-out text, windows of {window}: {_measure(model, tokenizer, prose, window)}")
    print(f"held-out conversations: {_measure(model, tokenizer, chats, LONG_TOKENS)}")


def _measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int
) -> Evaluation:
    """Every token but each text's first is predicted once, from at most `window` before it."""
    nats, tokens = 0.0, 0
    for ids in _encode(tokenizer, texts):
        for start in range(0, len(ids) - 1, window):
            piece = torch.from_numpy(ids[start : start + window + 1].astype(np.int64))[None]
            logits = model(input_ids=piece[:, :-1]).logits[0]
            nats += nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
            tokens += piece.shape[1] - 1
    text_bytes = sum(len(_MARKERS.sub("", text).encode()) for text in texts)
    return Evaluation(nats, tokens, text_bytes)


def main() -> None:
    """Train or evaluate, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="folder to write a trained model to")
    action.add_argument("--evaluate", type=Path, help="folder of a model to measure")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock training budget")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy the tokenizer from")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate:
        evaluate(arguments.evaluate)
    else:
        train(arguments.out, arguments.size, arguments.minutes, arguments.tokenizer)


if __name__ == "__main__":
    main()
