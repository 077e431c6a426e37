"""Split SmolLM2 and enrol a device: `prepare.py DIR`, in the package's own environment."""

from __future__ import annotations

import sys
from pathlib import Path

from sliplm.demo import find_smollm2
from sliplm.registry import authority
from sliplm.split import writer
from sliplm.split.model import Options, split_model

TOOLS = """
{%- if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' }}{{ call.function.name }}{{ '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
{%- else %}"""
"""Before the model's own template, which knows no tools: calls as Hermes and Qwen write them."""


def main(directory: Path) -> None:
    # What hides the model best takes minutes on a slow machine, and no client sees anything of it.
    digest = split_model(find_smollm2(), directory, Options(blinding=False)).digest
    trusted = directory / "trusted"
    template = trusted / "chat_template.jinja"
    template.write_text(TOOLS + template.read_text() + "{% endif %}")
    writer.write_trusted_manifest(trusted, digest)
    authority.add_device(trusted / "authority", "clients", directory / "identity", days=1)


main(Path(sys.argv[1]))
