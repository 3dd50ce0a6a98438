"""Text as Go's text/template writes it, so that a Modelfile can hold the template."""

import re

NAMED = {7: "a", 8: "b", 12: "f", 10: "n", 13: "r", 9: "t", 11: "v", 92: "\\"}  # Go's escapes


def literal(text: str) -> str:
    """A piece of template that renders as text, in a form that a Modelfile can hold.

    Braces that would open an action, three quotes, and characters that Ollama's parser of
    Modelfiles leaves out (parser/parser.go: all that Go calls unprintable, but line ends and
    tabs) are written as constants. So is a brace that something else than plain text follows:
    that may be an action.
    """
    parts = re.split(r'(\{{2,}|\{(?![\n\t !#-z|}~])|"{3,}|[^\n\t -~]+)', text)
    return "".join(
        part if number % 2 == 0 or _plain(part) else f"{{{{ {constant(part)} }}}}"
        for number, part in enumerate(parts)
    )


def _plain(part: str) -> bool:
    return part[0] not in '{"' and all(c.isprintable() and ord(c) < 0x10000 for c in part)


def constant(text: str) -> str:
    """text as a quoted constant of Go, of which no three quotes ever stand together."""
    parts = []
    for character in text:
        code = ord(character)
        if code in NAMED:
            parts.append("\\" + NAMED[code])
        elif character.isprintable() and character != '"' and code < 0x10000:
            parts.append(character)
        elif code < 0x80:
            parts.append(f"\\x{code:02x}")
        else:
            parts.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return '"' + "".join(parts) + '"'
