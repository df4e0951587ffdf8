"""Rows of training data from judged answers: the best ones, and pairs of a better and a worse one."""
