"""Services, jobs and command line: sources, fusion, distillation, evaluation, deployment."""
