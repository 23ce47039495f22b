"""The score program in one line, for the closing summary."""

from __future__ import annotations

from dist_export.manifest import ScoreEntry


def say_score(score: ScoreEntry) -> str:
    """Return what the score program takes, and how far it is from the model."""
    text = f"scores from {', '.join(tensor.name for tensor in score.inputs)}"
    if score.parity is None:
        return text
    worst = max(score.parity.max_abs.values(), default=0.0)
    sizes = ", ".join(map(str, score.parity.batch_sizes))
    further = score.parity.further_batches
    more = f" and {further:,} further batch{'' if further == 1 else 'es'}" if further else ""
    return f"{text}: largest difference {worst:.2g} at batch sizes {sizes}{more}"
