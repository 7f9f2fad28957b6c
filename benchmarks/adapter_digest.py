"""Which adapter a figure was measured with."""

import hashlib
from pathlib import Path


def adapter_digest(folder: str | Path) -> str:
    """The first 12 digits of the SHA-256 of an adapter's settings and weights."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()[:12]
