"""Answers that are decoded together, in one form of the model, by mlx-lm's batch generator."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.generate import BatchGenerator

from mlxlora.lora.whole import Part
from mlxlora.serve.batch.answer import Answer
from mlxlora.serve.batch.rows import Tag, Tagged
from mlxlora.serve.batch.sampling import Sampler
from mlxlora.serve.batch.together import Together

Finished = tuple[Answer, list[int], list[Any]]  # with the tokens that its caches hold


class Lane:
    """One continuous batch. form: what stands in the model while it computes."""

    def __init__(
        self,
        form: Part | None,
        model: Tagged,
        stop_tokens: Sequence[int],
        together: Together,
        prefill: int,
    ) -> None:
        self.form = form
        self.answers: dict[int, Answer] = {}
        self._generator = BatchGenerator(
            model,
            sampler=Sampler(model.rows),
            stop_tokens=[[token] for token in stop_tokens],
            completion_batch_size=together.rows,
            prefill_batch_size=together.prompts,
            prefill_step_size=prefill,
        )
        # It has wired all memory that the system recommends, which may freeze a small Mac;
        # closing undoes just that, and the engine has set limits of its own.
        self._generator.close()

    def insert(self, answer: Answer, caches: list[Any]) -> None:
        """Begin an answer; caches (one for each block) hold its first .cached tokens."""
        order = answer.order
        prompt = list(order.prompt)
        (answer.uid,) = self._generator.insert(
            [prompt[answer.cached :]],
            max_tokens=[order.max_tokens],
            caches=[[*caches, Tag([answer.row])]],
            all_tokens=[prompt[: answer.cached]],
            logits_processors=[answer.processors()],
        )
        self.answers[answer.uid] = answer

    def step(self) -> Iterator[Finished]:
        """One token for every row that decodes, a chunk of prompt for every other.

        Whatever fails on the way, .answers are those that were not given out as finished.
        """
        _, responses = self._generator.next()
        for response in responses:
            answer = self.answers.get(response.uid)
            if answer is None:
                continue
            done = answer.token(response.token, response.logprobs, response.finish_reason)
            if response.finish_reason is not None:
                del self.answers[response.uid]
                yield answer, response.all_tokens, response.prompt_cache[:-1]
            elif done:
                yield self.remove(answer)

    def remove(self, answer: Answer) -> Finished:
        """Stop computing an answer."""
        assert answer.uid is not None
        removed = self._generator.remove([answer.uid], return_prompt_caches=True)
        del self.answers[answer.uid]
        caches, tokens = removed.get(answer.uid, ([], []))
        return answer, tokens, caches[:-1]
