// Every word of the page, in both languages.
export const WORDS = {
  en: {
    other: "中文", model: "Model", beside: "Compare with", nobody: "no comparison", new: "New talk", settings: "Settings",
    system: "System text", temperature: "Temperature", top_p: "Top-p", max_tokens: "Longest reply (tokens)", seed: "Seed",
    key: "Key of this server",
    settings_note: "An empty field is as the model says. Temperature 0 always takes the likeliest word.",
    own_system: "the run's own", ask_here: "Ask something …", send: "Send", stop: "Stop", close: "Close", edit: "Edit",
    ask_again: "Ask again", leave: "Leave it", copy: "Copy", copied: "Copied", regenerate: "Again", correct: "Correct",
    keep: "Keep", tokens: "Tokens", rows: "Save as rows", tokens_title: "What the model reads",
    tokens_count: (n) => `${n} tokens. Special ones are coloured; text that only spells one is not.`,
    base: "base", tuned: "tuned", stopped: "stopped by you", length: "cut: the longest reply was reached",
    corrected: "corrected by you", wrong_key: "This server wants its key: open Settings.",
    no_server: "The server can not be reached.",
    welcome: "Ask the base and your run the same question and compare. An answer that you correct can be saved as a row to train on.",
  },
  zh: {
    other: "English", model: "模型", beside: "并排比较", nobody: "不比较", new: "新对话", settings: "设置", system: "系统提示",
    temperature: "温度", top_p: "Top-p", max_tokens: "回答上限（词元）", seed: "随机种子", key: "服务器密钥",
    settings_note: "留空即按模型自身的设置。温度为 0 时总取最可能的词。", own_system: "训练时的系统提示", ask_here: "问点什么……",
    send: "发送", stop: "停止", close: "关闭", edit: "修改", ask_again: "重新提问", leave: "取消", copy: "复制", copied: "已复制",
    regenerate: "重新生成", correct: "改正", keep: "保存", tokens: "词元", rows: "存为训练数据", tokens_title: "模型读到的内容",
    tokens_count: (n) => `共 ${n} 个词元。特殊词元有颜色；仅仅拼写相同的文字没有。`,
    base: "基础模型", tuned: "微调后", stopped: "已手动停止", length: "达到回答上限，被截断", corrected: "已改正",
    wrong_key: "服务器需要密钥：请打开设置。", no_server: "无法连接服务器。",
    welcome: "向基础模型和您训练的模型问同一个问题，比较两者的回答。改正后的回答可以存为训练数据。",
  },
};
