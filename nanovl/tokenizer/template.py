"""How conversations become tokens, as a chat template that `transformers` reads: nanochat's format.

    <|bos|> <|user_start|>...<|user_end|> <|assistant_start|>...<|assistant_end|> <|user_start|>...

A system message stands before the first user's, with an empty line between. An assistant's content is text, or a list
of parts: `text`, `python` (code that it runs) and `python_output`.
"""

from __future__ import annotations

TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE = r"""{%- set turn = namespace(system='', count=0) -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}
{%- set turn.system = message.content + '\n\n' -%}
{%- elif message.role != ['user', 'assistant'][turn.count % 2] -%}
{{- raise_exception('user and assistant take turns, after one system message at most; this is ' + message.role) -}}
{%- else -%}
{%- set turn.count = turn.count + 1 -%}
{{- '<|' + message.role + '_start|>' + turn.system -}}
{%- set turn.system = '' -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{- part.text -}}
{%- elif part.type == 'python' -%}
{{- '<|python_start|>' + part.text + '<|python_end|>' -}}
{%- elif part.type == 'python_output' -%}
{{- '<|output_start|>' + part.text + '<|output_end|>' -}}
{%- else -%}
{{- raise_exception('part of type ' + part.type + ': wants text, python or python_output') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|' + message.role + '_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""
