"""Fine-tuning on GLUE: the tasks, their data and metrics, and tables over several seeds that can be trusted."""
