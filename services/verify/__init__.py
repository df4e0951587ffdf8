"""The verifier service: judge answers by what can be checked, programs in a sandbox."""
