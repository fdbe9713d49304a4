"""AIM under other people's training loops. Each module is imported by its own name, since each needs its own package:

``aim_kernels.integrations.lightning`` (Lightning), ``aim_kernels.integrations.transformers`` (the Trainer of Hugging
Face), ``aim_kernels.integrations.tensorboard`` (nothing but a writer that has ``add_scalar``).
"""
