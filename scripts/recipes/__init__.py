"""The machinery that the training scripts share: data, masking, schedules, metrics."""
