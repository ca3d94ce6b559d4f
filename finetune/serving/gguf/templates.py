"""Which template goes into a GGUF file and into the Modelfile beside it: the one that the model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.data.templates.chat_jinja import write_jinja
from finetune.data.templates.chat_templates import CHAT_FORMATS
from finetune.data.templates.default_template import choose_format
from finetune.data.templates.jinja_forms import JINJA_FORMS
from finetune.data.templates.own_templates import DEFAULT, read_own_templates
from finetune.data.templates.template import PLAIN_NAMES
from finetune.data.templates.trained_template import template_source, trained_system, trained_template
from finetune.families.chat_format import ChatFormat
from finetune.families.family import Family
from finetune.serving.gguf.modelfile import fits_quotes, go_template, write_modelfile
from finetune.serving.gguf.vocabulary import Vocabulary

_IN_GGUF = (
    "The chat template is jinja text, which is in the GGUF file; Ollama takes it from there only where it knows it: "
    "else write TEMPLATE"
)
_PLAIN_TEMPLATE = "{{ .Prompt }}"


@dataclass(frozen=True)
class ChosenTemplate:
    """How conversations are written.

    Attributes:
        jinja: For llama.cpp; None for a model that was trained on plain text.
        chat: The built-in format that it comes from; None for jinja text of others.
        system: System text of conversations that have none.
    """

    jinja: str | None
    chat: ChatFormat | None
    system: str | None

    @property
    def end(self) -> str:
        """Token by which answers end; "" where it is the end of the sequence, or not known."""
        return self.chat.end if self.chat else ""


def choose_template(folder: Path, family: Family) -> ChosenTemplate:
    """The template of the training; where none is on record the folder's own, then the family's."""
    name, system = trained_template(folder), trained_system(folder)
    if name in PLAIN_NAMES:
        return ChosenTemplate(None, None, system)
    own = read_own_templates(folder).by_name.get(DEFAULT)
    if name is None and own is None:
        name = choose_format(family.chat_template, folder)
    chat = CHAT_FORMATS.get(name or "")
    source = template_source(folder, family.tokenizer)
    if chat is not None and source is None:
        source = write_jinja(chat, family.tokenizer)
    if source is None and name in JINJA_FORMS:
        source = JINJA_FORMS[name].source
    if system is None and chat is not None:
        system = chat.default_system
    return ChosenTemplate(own if source is None else source, chat, system)


def describe_model(weights: str, chosen: ChosenTemplate, vocabulary: Vocabulary, family: Family) -> str:
    """The Modelfile.

    Args:
        weights: Name of the GGUF file beside it.
        chosen: How conversations are written.
        vocabulary: The tokenizer.
        family: Record of the model.
    """
    tokens, roles, facts = vocabulary.tokens, vocabulary.roles, family.tokenizer
    bos = tokens[roles["bos"]] if vocabulary.adds_bos else ""
    place = vocabulary.find(facts.end_of_answer)
    eos = tokens[roles["eos"] if place is None else place]
    template, notes = None if chosen.jinja else _PLAIN_TEMPLATE, []
    if chosen.chat:
        template = go_template(chosen.chat, bos=bos, eos=eos)
    if template is None:
        notes.append(_IN_GGUF)
    system = chosen.system
    if system and not fits_quotes(system):
        notes.append(
            "The system text cannot stand here because of its quotation marks: send it with requests"
        )
        system = None
    known = set(tokens)
    stops = [name for name in (chosen.end, eos, *facts.chat_ends) if name in known]
    return write_modelfile(weights, template=template, notes=notes, system=system, stops=stops)
