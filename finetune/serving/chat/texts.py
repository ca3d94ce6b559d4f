"""Words of the chat page in the languages it speaks."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Chat",
        "message": "Message",
        "placeholder": "Write a message; Enter sends it, Shift+Enter begins a new line",
        "send": "Send",
        "stop": "Stop",
        "clear": "New conversation",
        "settings": "Settings",
        "system": "System text",
        "system_info": "How the model should behave; empty leaves it to the chat template",
        "temperature": "Temperature",
        "temperature_info": "0 always takes the most probable token",
        "top_p": "Top-p",
        "top_p_info": "Only the tokens that hold this much of the probability",
        "top_k": "Top-k",
        "top_k_info": "Only this many tokens; 0 is all, 1 is greedy",
        "repetition_penalty": "Repetition penalty",
        "repetition_penalty_info": "Above 1 repeats less",
        "max_new_tokens": "Longest answer (tokens)",
        "max_new_tokens_info": "Prompt and answer share the model's positions",
        "seed": "Seed",
        "seed_info": "The same seed gives the same answer",
        "markdown": "Markdown",
        "markdown_info": "Headings, lists and code set as such, instead of the text as it is",
        "before": "Before",
        "after": "After",
        "model": "Model",
        "no_history": "This model has no chat template: every message stands alone.",
        "too_long": "{name}: {num} characters, but at most {limit} are taken. Shorten it",
        "too_many_turns": "The conversation has {limit} turns, which is the most. Begin a new one",
        "no_model": "No model is loaded yet",
        "no_number": "{name}: {value} is no number that can be used here",
    },
    "zh": {
        "title": "对话",
        "message": "消息",
        "placeholder": "输入消息；回车发送，Shift+回车换行",
        "send": "发送",
        "stop": "停止",
        "clear": "新对话",
        "settings": "设置",
        "system": "系统提示",
        "system_info": "规定模型的角色和行为；留空则由对话模板决定",
        "temperature": "温度",
        "temperature_info": "0 表示总是取概率最大的词元",
        "top_p": "Top-p",
        "top_p_info": "只在累计概率达到此值的词元中采样",
        "top_k": "Top-k",
        "top_k_info": "只在前 k 个词元中采样；0 为全部，1 为贪心",
        "repetition_penalty": "重复惩罚",
        "repetition_penalty_info": "大于 1 可减少重复",
        "max_new_tokens": "回答的最大长度（词元）",
        "max_new_tokens_info": "提示与回答共用模型的位置数",
        "seed": "随机种子",
        "seed_info": "种子相同则回答相同",
        "markdown": "Markdown",
        "markdown_info": "把标题、列表和代码排版显示，而不是显示原文",
        "before": "微调前",
        "after": "微调后",
        "model": "模型",
        "no_history": "此模型没有对话模板：每条消息单独回答。",
        "too_long": "{name}：共 {num} 个字符，最多 {limit} 个。请缩短",
        "too_many_turns": "对话已有 {limit} 轮，达到上限。请开始新对话",
        "no_model": "尚未载入模型",
        "no_number": "{name}：{value} 不是这里可用的数字",
    },
}


def preferred_language(accept_language: str | None) -> str:
    """The page's language for a browser's header Accept-Language: Chinese where it comes before English."""
    for part in (accept_language or "").lower().split(","):
        code = part.strip()[:2]
        if code in TEXTS:
            return code
    return "en"


def other_language(language: str) -> str:
    """The one that the page can be switched to."""
    return "zh" if language == "en" else "en"
