"""The protocol of go-judge, for callers that speak it: docs/reference/go-judge.md."""
