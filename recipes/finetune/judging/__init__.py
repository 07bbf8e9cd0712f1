"""From predictions to figures, intervals and verdicts."""
