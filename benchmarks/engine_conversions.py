"""A model folder in the formats of engines that do not read Hugging Face's, converted here on first use.

Runs in the environment of the engine that needs it, without a network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def openvino(model: str) -> Path:
    """The folder as OpenVINO IR, by optimum-intel's exporter, in the dtype of the checkpoint."""
    folder = Path(f"{model}-openvino")
    if not (folder / "openvino_model.xml").exists():
        exporter = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past"]
        command = [str(exporter), "export", "openvino", "--model", model, *task, str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def gguf(model: str) -> Path:
    """The folder as one GGUF file, a Llama without a vocabulary, in the dtype of the checkpoint."""
    import numpy
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    file = Path(f"{model}.gguf")
    if file.exists():
        return file
    config = json.loads((Path(model) / "config.json").read_text())
    layers, heads, kv_heads = (
        config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    with (Path(model) / "model.safetensors").open("rb") as stored:
        header = json.loads(stored.read(int.from_bytes(stored.read(8), "little")))
        start = stored.tell()
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            first, last = tensor["data_offsets"]
            stored.seek(start + first)
            wide = tensor["dtype"] == "F32"
            values = numpy.frombuffer(stored.read(last - first), numpy.uint32 if wide else numpy.uint16)
            values = values.reshape(tensor["shape"])
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp turns neighbouring dimensions, not those half a head apart.
                count = heads if "q_proj" in name else kv_heads
                turned = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2)
                values = turned.reshape(values.shape)
            target = names.get_name(name, try_suffixes=(".weight",))
            if values.ndim == 1:  # norms are float32 there; those of bfloat16 are its upper halves
                bits = values if wide else values.astype(numpy.uint32) << 16
                writer.add_tensor(target, bits.view(numpy.float32))
            elif wide:
                writer.add_tensor(target, values.view(numpy.float32))
            else:
                writer.add_tensor(target, values.view(numpy.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
