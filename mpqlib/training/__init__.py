"""One-shot training: scheduler, distortion, step, optimization, evaluation and loop."""
