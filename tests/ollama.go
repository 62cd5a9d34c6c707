// What Ollama makes of a template: Go's own text/template, given what Ollama gives it.
//
// Reads [{template, messages: [{role, content}]}] from standard input, writes [{text, error}].
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type question struct {
	Template string    `json:"template"`
	Messages []message `json:"messages"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func answered(asked question) answer {
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	if err != nil {
		return answer{Error: err.Error()}
	}
	// All system texts are also joined into one, and neighbours of one role become one message.
	systems := []string{}
	messages := []*message{}
	for i := range asked.Messages {
		next := &asked.Messages[i]
		if next.Role == "system" {
			systems = append(systems, next.Content)
		}
		if n := len(messages); n > 0 && messages[n-1].Role == next.Role {
			messages[n-1].Content += "\n\n" + next.Content
		} else {
			messages = append(messages, next)
		}
	}
	var text strings.Builder
	values := map[string]any{"System": strings.Join(systems, "\n\n"), "Messages": messages, "Response": ""}
	if err := parsed.Execute(&text, values); err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Text: text.String()}
}

func main() {
	questions := []question{}
	if err := json.NewDecoder(os.Stdin).Decode(&questions); err != nil {
		panic(err)
	}
	answers := []answer{}
	for _, asked := range questions {
		answers = append(answers, answered(asked))
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(answers); err != nil {
		panic(err)
	}
}
