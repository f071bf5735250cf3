"""The machine and the versions of a result, in words."""

from __future__ import annotations

from typing import Any


def host_words(host: dict[str, Any], dtypes: str) -> str:
    """The machine and the dtypes."""
    threads = host["torch_threads"]
    return f"{host['cpu']}, {threads} thread{'s' if threads > 1 else ''}, {dtypes}"


def software_words(host: dict[str, Any]) -> str:
    """Versions and commit."""
    versions = host["versions"]
    return (
        f"torch {versions['torch']}, transformers {versions['transformers']}, commit "
        f"{host['commit'][:7]}"
    )


def peer_versions(host: dict[str, Any]) -> str:
    """Versions of the peers that are there."""
    found = ((name, host["versions"].get(name)) for name in ("trl", "liger-kernel"))
    return "".join(f", {name} {version}" for name, version in found if version)
