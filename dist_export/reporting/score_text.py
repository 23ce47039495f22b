"""The score program and the serving contract, each in one line, for the closing summary."""

from __future__ import annotations

import msgspec

from dist_export.manifest import ScoreEntry, ServingEntry


def say_contract(serving: ServingEntry) -> str:
    """Return how many dense inputs the serving contract knows, and how far it is from the model."""
    known = sum(1 for entry in serving.inputs if entry.unknown is msgspec.UNSET)
    text = f"{known} of {len(serving.inputs)} dense inputs from ids"
    if serving.replay is None:
        return text
    worst = max(serving.replay.max_abs.values(), default=0.0)
    return f"{text}: largest difference of a score {worst:.2g} on {serving.replay.rows:,} examples"


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
