"""Chat templates with tools, shortened from those that published models have."""

HERMES = """
{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}
<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>' + m.role }}
{%- if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls %}{% if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}{{ call.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

LLAMA = """
{%- for m in messages %}
{%- if loop.first and tools %}{{ '<|start|>tools<|end|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- if not (m.role == 'tool' or 'tool_calls' in m) %}
{{- '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start|>assistant<|end|>\n\n' }}{{ '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}
{{- '}<|eot|>' }}
{%- else %}{{ '<|start|>ipython<|end|>\n\n' + m.content + '<|eot|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}
"""

MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('IDs have length 9!') }}{% endif %}
{%- set out = call.function | tojson %}{{ out[:-1] }}{{ ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}
"""

FUNCTION = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ '<' + m.role + '>' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<function=' + call.function.name + '>' }}{{ call.function.arguments | tojson }}{{ '</function>' }}
{%- endfor %}{{ '<eos>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}
"""

XML = FUNCTION.replace(
    "{{ call.function.arguments | tojson }}", "{{ '<parameter=x>' + call.function.arguments.sliplm }}"
)

MISTRAL_LAST = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' and loop.last and system %}{{ '[INST] ' + system + ' ' + m.content + '[/INST]' }}
{%- el""" + MISTRAL.partition("{%- for m in messages %}\n{%- ")[2]
"""Of version 0.3: the system message is in the last turn, and nowhere if that is not the user's."""

_SYSTEM = "{%- if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}"
FORGETFUL = {
    "default": "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '\n' }}{% endfor %}model: ",
    "tool_use": HERMES.replace(_SYSTEM, ""),
}
"""Named templates, of which the one with tools has no system role."""
