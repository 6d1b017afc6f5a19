"""Long Range Arena with the Nystromformer of its published code: model, data, task."""
