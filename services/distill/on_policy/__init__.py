"""On-policy distillation (Agarwal et al. 2024, arXiv:2306.13649): the target learns from its own answers.

A run has rounds. At the start of a round the target as it is then answers prompts, and the answers become a ledger in
the run's folder. The steps of the round take windows of the fused stream and answers of the ledger, side by side; the
fusion service fuses the sources' rows over an answer as it does for any text.

rounds/NUMBER-HASH/round.json        the round: number, hash of the weights that answered, counts, time
rounds/NUMBER-HASH/answers-N.parquet its answers with their prompts; the folder appears whole
"""
