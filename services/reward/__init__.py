"""The reward model: one model for wishes that contradict each other, told apart by a system prompt per domain."""
