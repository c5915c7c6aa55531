"""`chat` and `stream_chat` for a model written by TernLM; loaded with trust_remote_code=True, not needed otherwise.

The conversation's text is the tokenizer's chat template; answers end at the ids in generation_config.json.
"""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers import _ARCHITECTURE_ForCausalLM as _Native  # type: ignore[attr-defined]

from ternlm.data.typed import ChatEncoder


class TernForCausalLM(_Native):
    """The native model with two ways to talk."""

    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: Any = (),
        system: str | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        **options: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer `query`; returns (answer, history), which is a list of (question, answer).

        options: as for `generate`, such as temperature and top_p (0.8 each unless given) or streamer.
        """
        ids = self._chat_ids(tokenizer, query, history, system)
        output = self.generate(**self._chat_options(ids, max_new_tokens, do_sample, options))
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        answer = self._chat_answer(tokenizer, answer)
        return answer, [*history, (query, answer)]

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Any = (),
        system: str | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        **options: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yield (answer so far, history) as the answer grows."""
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self._chat_ids(tokenizer, query, history, system)
        options = self._chat_options(ids, max_new_tokens, do_sample, {**options, "streamer": streamer})
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with torch.no_grad():
                    self.generate(**options)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        answer = ""
        for piece in streamer:
            answer += piece
            shown = self._chat_answer(tokenizer, answer)
            yield shown, [*history, (query, shown)]
        thread.join()
        if failure:
            raise failure[0]

    def _chat_options(self, ids: Any, max_new_tokens: int, do_sample: bool, options: dict[str, Any]) -> dict[str, Any]:
        chosen = (
            {"temperature": 0.8, "top_p": 0.8} if do_sample else {"temperature": None, "top_p": None, "top_k": None}
        )
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**inputs, "max_new_tokens": max_new_tokens, "do_sample": do_sample, **chosen, **options}

    def _chat_ids(self, tokenizer: Any, query: str, history: Any, system: str | None) -> torch.Tensor:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": query})

        def render(conversation: Any) -> str:
            return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

        def encode_markup(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        encoder = ChatEncoder(tokenizer.backend_tokenizer.to_str())
        return torch.tensor([encoder.encode(messages, render, encode_markup)], device=self.device)

    def _chat_answer(self, tokenizer: Any, answer: str) -> str:
        """Drop the tokens that end an answer, where they aren't special to the tokenizer."""
        ends = self.generation_config.eos_token_id
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None:
                answer = answer.split(tokenizer.convert_ids_to_tokens(end))[0]
        return answer
