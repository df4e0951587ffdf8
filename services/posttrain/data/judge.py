"""The verdicts on answers: in this process, programs at a verifier that is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from fusion_core.verify.specs import ProgramSpec
from fusion_core.verify.verdict import Verdict
from services.base.errors import SettingError
from services.posttrain.config import VerifierAddress
from services.posttrain.data.rows import VerifiedPrompt
from services.verify.client import VerdictStream


class Judge:
    """Holds answers against the specs of their prompts."""

    def __init__(self, verifier: VerifierAddress | None) -> None:
        self._verifier = verifier

    def check(self, prompts: Sequence[VerifiedPrompt]) -> None:
        """Raise SettingError where a prompt asks for a program and there is no verifier to run it."""
        if self._verifier is None and any(isinstance(prompt.spec, ProgramSpec) for prompt in prompts):
            raise SettingError("verifier", "needed, because a spec has a program to test; programs run in its sandbox")

    def verdicts(self, prompts: Sequence[VerifiedPrompt], answers: Sequence[str]) -> list[Verdict]:
        """Return the verdict on the answer to each prompt; raises ServiceError when the verifier fails."""
        programs = [place for place, prompt in enumerate(prompts) if isinstance(prompt.spec, ProgramSpec)]
        served = asyncio.run(self._programs([(answers[i], prompts[i].verify) for i in programs])) if programs else []
        by_place = dict(zip(programs, served, strict=True))
        found = []
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if isinstance(prompt.spec, ProgramSpec):
                found.append(by_place[place])
            else:
                found.append(prompt.spec.judge(answer))
        return found

    async def _programs(self, submissions: Sequence[tuple[str, object]]) -> list[Verdict]:
        assert self._verifier is not None, "checked before"
        stream = VerdictStream(self._verifier.address, self._verifier.application)
        try:
            asked = (stream.verdict((text, json.dumps(spec).encode())) for text, spec in submissions)
            return list(await asyncio.gather(*asked))
        finally:
            await stream.close()
