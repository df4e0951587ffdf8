"""Everything that serves, streams or runs a job: source and fusion services, distillation, command line."""
