"""What clients say and are told, in OpenAI's form: pure functions, no model."""
