"""Any other channel (Slack, Teams, Matrix, e-mail, ntfy, ...) through apprise, by one apprise address each."""

from __future__ import annotations

import logging
import re

from workbench.errors import Invalid, Unavailable
from workbench.notifications import Message

# An address may hold commas of its own; a new one begins with its scheme.
_BETWEEN = re.compile(r"[\s,]+(?=[A-Za-z][A-Za-z0-9+.-]*://)")
# What services take for a mention (@all, <!channel>), a tag or a masked link; a zero-width space parts it.
_MARKUP = re.compile(r"(@(?!\d)|<|\](?=\())")
TEXT = 3000  # characters; services cut or split longer ones


class Apprise:
    """One service. address: as github.com/caronc/apprise writes it; a secret, in no error and no log line.

    Raises Invalid when apprise does not know the address. position: which of the setting's addresses this is.
    """

    def __init__(self, address: str, position: int = 1) -> None:
        import apprise
        # apprise logs addresses with their passwords in them.
        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        scheme = address.partition("://")[0] if re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://", address) else "no scheme"
        self.name = f"notify_urls {position} ({scheme})"
        self._sender = apprise.Apprise()
        try:
            is_known = self._sender.add(address)
        except TypeError:
            is_known = False
        if not is_known:
            raise Invalid(f"Address {position} of the setting notify_urls ({scheme}) is none that apprise knows. Write "
                          "it as https://github.com/caronc/apprise/wiki says.")

    def __repr__(self) -> str:
        return f"Apprise({self.name})"

    def send(self, message: Message) -> None:
        """Sends title, text, lines, link and, where the service takes files, the plot. Raises Unavailable."""
        import apprise
        from apprise.attachment.memory import AttachMemory
        body = "\n".join(filter(None, (neutral(message.text), *(f"{neutral(name)}: {neutral(value)}"
                                                                for name, value in message.lines))))[:TEXT]
        body = "\n".join(filter(None, (body, message.link))) or "–"
        attached = AttachMemory(content=message.image, name="plot.png", mimetype="image/png") if message.image else None
        try:
            sent = self._sender.notify(body=body, title=neutral(message.title)[:200], attach=attached,
                                       notify_type=apprise.NotifyType(message.mood),
                                       body_format=apprise.NotifyFormat.TEXT)
        except Exception as error:  # whatever a service's plug-in raises; its text may hold the address
            raise Unavailable(f"{self.name} failed ({type(error).__name__}). Try it with `workbench notify "
                              "--test`.") from None
        if not sent:
            raise Unavailable(f"{self.name} did not take the message. Look at its address, token and reach, and try it "
                              "with `workbench notify --test`.")


def addresses(setting: str) -> list[str]:
    """The addresses of the setting notify_urls, which are separated by commas or spaces."""
    return [one for one in _BETWEEN.split(setting.strip().strip(",")) if one]


def neutral(text: str) -> str:
    """Text that mentions nobody and links nothing masked, in any service."""
    return _MARKUP.sub("\\1\u200b", text)
