"""The chat template for conversations with tools; SmolLM2 comes with one that knows none.

ChatML, with tools and calls written as Hermes, Qwen and ERNIE models write them: a JSON object between
<tool_call> and </tool_call>.
"""

_SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face\n\n"
    "You may call functions to answer the user. They are, one a line in JSON:\n<tools>\n"
)
_HOW = (
    "</tools>\nTo call one, write\n"
    '<tool_call>\n{"name": <its name>, "arguments": <a JSON object>}\n</tool_call>'
)
TOOL_USE = (
    "{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    f"{{{{ {_SYSTEM!r} }}}}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    f"{{{{ {_HOW!r} + '<|im_end|>\n' }}}}"
    "{% for message in messages %}{% if not (loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n' + (call['function'] | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
