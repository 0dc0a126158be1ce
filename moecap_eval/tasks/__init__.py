"""Questions with known answers: JSONL files that need no network, and lm_eval tasks."""

from __future__ import annotations

from moecap_eval.tasks.jsonl import Choice, Question, load_items
from moecap_eval.tasks.scoring import exact_match, until_stop

__all__ = ["Choice", "Question", "exact_match", "load_items", "until_stop"]
