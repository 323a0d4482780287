"""Draft models: initialised from the family, distilled on the target's own answers, judged by acceptance."""
