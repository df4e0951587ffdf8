"""Post-training: a chain of SFT, DPO and GRPO stages on TRL's trainers, each let through by a gate."""
