"""A chat template's structure as a template for Ollama.

Ollama executes it over .Messages (of system, user and assistant), .System (all system messages)
and whether thinking is wished for; an answer that stands last is one to be continued. An answer's
thinking is shown only there, as chat templates do. Read in ollama's template/template.go,
thinking/template.go and server/routes.go.
"""

import os

from mlxlora.export.ollama.literal import constant, literal
from mlxlora.export.ollama.turns import Strip, System, Turns


def go_template(turns: Turns) -> str:
    """The text of the TEMPLATE. Braces, quotes and the like in turns are escaped."""
    return _Writer(turns).text()


class _Writer:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.strips: list[Strip] = []  # those that are used, defined in front

    def text(self) -> str:
        turns, system = self.turns, self.turns.system
        merged = system is not None and system.kind != "own"
        body = "".join(
            [
                "{{ $system := .System }}" if merged else "",
                "{{ $first := true }}" if turns.first != turns.user.before else "",
                self._start(),
                "{{ range $i, $_ := .Messages }}",
                self._default(),
                "{{ $last := eq (len (slice $.Messages $i)) 1 }}",
                '{{ if eq .Role "user" }}',
                self._user(),
                '{{ else if eq .Role "assistant" }}',
                self._assistant(),
                self._own(),
                "{{ end }}",
                '{{ if and $last (ne .Role "assistant") }}',
                self._prompt(),
                "{{ end }}{{ end }}",
            ]
        )
        return "".join(_definition(n, s) for n, s in enumerate(self.strips)) + body

    def _words(self, what: str, strip: Strip) -> str:
        if strip == Strip():
            return f"{{{{ {what} }}}}"
        if strip not in self.strips:
            self.strips.append(strip)
        return f'{{{{ template "strip{self.strips.index(strip)}" {what} }}}}'

    def _start(self) -> str:
        """What comes before all turns; with it a system's turn that stands only there."""
        turns, system = self.turns, self.turns.system
        if system is None or system.kind != "own":
            return literal(turns.start)
        if system.own is not None:
            return literal(system.before.removesuffix(system.own))
        words = self._words(".System", system.strip)
        there = literal(system.before) + words + literal(system.after)
        return _choose([(".System", there)], literal(turns.start))

    def _default(self) -> str:
        """What stands in place of a system's turn if the first one is another's."""
        system = self.turns.system
        if system is None or system.own is None:
            return ""
        text = literal(self.turns.start[len(system.before.removesuffix(system.own)) :])
        condition = 'and (eq $i 0) (ne .Role "system")'
        return _choose([(condition, text)], "") if text else ""

    def _own(self) -> str:
        system = self.turns.system
        if system is None or system.own is None:
            return ""
        words = self._words(".Content", system.strip)
        turn = literal(system.own) + words + literal(system.after)
        return f'{{{{ else if eq .Role "system" }}}}{turn}'

    def _user(self) -> str:
        turns, system = self.turns, self.turns.system
        cases = []
        if system is not None and system.kind != "own":
            condition = "$system" if system.kind == "first" else "and $last $system"
            cases.append((condition, self._with_system(system)))
        words = self._words(".Content", turns.user.strip)
        if turns.first != turns.user.before:
            cases.append(("$first", literal(turns.first) + words))
        text = _choose(cases, literal(turns.user.before) + words)
        gone = "{{ $first = false }}" if turns.first != turns.user.before else ""
        return text + gone + literal(turns.user.after)

    def _with_system(self, system: System) -> str:
        words = self._words("$system", system.strip)
        gone = '{{ $system = "" }}' if system.kind == "first" else ""
        user = self._words(".Content", system.user_strip)
        return literal(system.before) + words + gone + literal(system.after) + user

    def _assistant(self) -> str:
        turns = self.turns
        words = self._words(".Content", turns.assistant.strip)
        return self._before_answer() + words + _unless("$last", literal(turns.assistant.after))

    def _before_answer(self) -> str:
        """Ollama takes the texts of the last list that shows .Thinking for the tags around it."""
        turns, around = self.turns, self.turns.thinking
        before, continued = turns.assistant.before, turns.continued
        thought = [around.before, turns.prompt] if around is not None else []
        same = len(os.path.commonprefix([before, continued, *thought]))
        cases = []
        if around is not None:
            tagged = literal(around.before[same:]) + "{{ .Thinking }}" + literal(around.after)
            cases.append(("and $last .Thinking", tagged))
        if continued != before:
            cases.append(("$last", literal(continued[same:])))
        return literal(before[:same]) + _choose(cases, literal(before[same:]))

    def _prompt(self) -> str:
        on, off = self.turns.prompt, self.turns.prompt_off
        same = os.path.commonprefix([on, off])
        on, off = literal(on[len(same) :]), literal(off[len(same) :])
        if not on and not off:
            return literal(same)
        return literal(same) + _choose([("and $.IsThinkSet (not $.Think)", off)], on)


def _choose(cases: list[tuple[str, str]], otherwise: str) -> str:
    """The text of the first case that holds."""
    if not cases:
        return otherwise
    text = "{{ else if ".join(f"{condition} }}}}{then}" for condition, then in cases)
    return "{{ if " + text + (f"{{{{ else }}}}{otherwise}" if otherwise else "") + "{{ end }}"


def _unless(condition: str, text: str) -> str:
    return f"{{{{ if not {condition} }}}}{text}{{{{ end }}}}" if text else ""


def _definition(number: int, strip: Strip) -> str:
    """A template that shows its argument stripped. Go offers no such function, so it takes off
    one character and calls itself; len (slice . 1) is the place of the last one."""
    right = left = "{{ . }}"
    text = ""
    if strip.right:
        name = f'"right{number}"'
        again = f"{{{{ template {name} (slice . 0 $end) }}}}"
        there = _choose([(f"eq (slice . $end) {_listed(strip.right)}", again)], "{{ . }}")
        there = _choose([(".", "{{ $end := len (slice . 1) }}" + there)], "")
        text += f"{{{{ define {name} }}}}{there}{{{{ end }}}}"
        right = left = f"{{{{ template {name} . }}}}"
    name = f'"strip{number}"'
    if strip.left:
        again = f"{{{{ template {name} (slice . 1) }}}}"
        there = _choose([(f"eq (slice . 0 1) {_listed(strip.left)}", again)], right)
        left = _choose([(".", there)], "")
    return text + f"{{{{ define {name} }}}}{left}{{{{ end }}}}"


def _listed(characters: str) -> str:
    return " ".join(constant(character) for character in characters)
