"""Chat templates of the published CLEX and GeNE chat models, in Jinja.

They are used if a checkpoint's tokenizer has no chat template.
"""

import re

# FastChat's vicuna turns, without its system sentence.
# Source: lm-sys/FastChat, fastchat/conversation.py, `vicuna_v1.1`.
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Source: the model card of CLEX-Mixtral-8x7B-Chat-32k.
ZEPHYR = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Source: LhLi-QED/GeNE at cd27b18, its instruction data: turns of "user: ", text,
# "\n\nassistant: ", answer and </s>, after one <s>.
GENE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ 'user: ' + message['content'] + '\\n\\nassistant: ' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    r"clex-7b-chat": VICUNA,
    r"clex-mixtral-8x7b-chat": ZEPHYR,
    r"llama2-gene-64k-chat": GENE,
}


def template_for(name: str) -> str | None:
    """Return the chat template of a published chat model, or None for other models.

    Args:
        name: hub id or folder name, for example "DAMO-NLP-SG/CLEX-7B-Chat-16K".
    """
    for pattern, template in TEMPLATES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return template
    return None
