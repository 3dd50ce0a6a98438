"""From JSONL to batches: records (rows), render (tokens and mask), batches (order and shapes)."""
