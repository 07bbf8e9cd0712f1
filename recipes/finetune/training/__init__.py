"""The stages of a trial: what is trained, how, and what is evaluated."""
