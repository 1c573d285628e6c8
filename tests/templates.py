"""Small chat templates with the behaviours of public ones: what they keep of earlier turns, what they put before an
answer, how a prompt ends. The markers are those of the tests' tokenizer.
"""

ASKED = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"

# A date, tools in the first message of the user, calls as JSON
LLAMA3 = (
    "{{ '<|bos|>' + strftime_now('%d %b %Y') }}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ m.content | trim }}{% endif %}"
    "{% else %}{{ '<|user|>' + m.role + '\\n\\n' }}"
    "{% if tools and loop.first %}{{ tools | tojson }}{% endif %}{{ m.content | trim }}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}" + ASKED
)

# Reasoning is shown behind the last message of the user alone, where it is missing as an empty block
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|assistant|>' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name }}{{ c.function.arguments | tojson }}"
    "{{ '</tool_call>' }}{% endfor %}{{ '<|end|>\\n' }}"
    "{% else %}{{ '<|user|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
)
QWEN3_ASKED = (
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
QWEN35_ASKED = (
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% else %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)

# Channels; the last answer ends with another token than those before it, whose analysis is left out
GPT_OSS = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% if m.thinking and loop.last %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|close|><|assistant|>' }}"
    "{% endif %}{{ '<|channel|>final<|message|>' + m.content }}"
    "{{ '<|end|>' if loop.last and not add_generation_prompt else '<|close|>' }}"
    "{% else %}{{ '<|user|>' + m.content + '<|close|>' }}{% endif %}{% endfor %}" + ASKED
)

# The system's message stands in the user's; roles must alternate
GEMMA3 = (
    "{% set ns = namespace(first='') %}{{ '<|bos|>' }}"
    "{% if messages[0].role == 'system' %}{% set ns.first = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content | trim }}"
    "{% else %}{{ '<|user|>' }}{% if loop.first %}{{ ns.first }}{% endif %}{{ m.content | trim }}{% endif %}"
    "{{ '<|end|>\\n' }}{% endfor %}" + ASKED
)

# Tools stand before the last message of the user alone, so that every turn shows the history in another way
MISTRAL = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[TOOLS]' }}{{ tools | tojson }}{{ '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.tool_call_id + ':' + m.content + '[/RESULT]' }}"
    "{% elif m.tool_calls %}{{ '[CALLS]' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{{ '<|end|>' }}"
    "{% else %}{{ ' ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
)

# A system message where there is none, and a line's end behind every turn
SMOLLM2 = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}{{ '<|user|>system\\nYou help.<|end|>\\n' }}{% endif %}"
    "{{ ('<|assistant|>' if m.role == 'assistant' else '<|user|>' + m.role + '\\n') + m.content + '<|end|>\\n' }}"
    "{% endfor %}" + ASKED
)

# The prompt opens a thought; no thought is ever shown again
DEEPSEEK_R1 = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
