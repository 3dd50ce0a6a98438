// Chats rendered by Go's own text/template in the way Ollama executes a TEMPLATE: JSON in, JSON out.
//
// In: {"template": text, "chats": [{"system": text, "think": null or bool, "messages": [...]}]}.
// Out: {"texts": [text, ...], "tags": [opening, closing]}, the tags being those by which Ollama
// would tell thinking from answers: the texts around .Thinking in the turn that shows it.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type Message struct {
	Role, Content, Thinking string
}

type Chat struct {
	System   string
	Think    *bool
	Messages []Message
}

// joined is the chat with the Modelfile's system message in front, neighbours of one role as one,
// and all its system messages.
func (chat Chat) joined() (messages []*Message, system string) {
	all := chat.Messages
	if chat.System != "" && all[0].Role != "system" {
		all = append([]Message{{Role: "system", Content: chat.System}}, all...)
	}
	var systems []string
	for i := range all {
		message := all[i]
		if message.Role == "system" {
			systems = append(systems, message.Content)
		}
		if n := len(messages); n > 0 && messages[n-1].Role == message.Role {
			messages[n-1].Content += "\n\n" + message.Content
		} else {
			messages = append(messages, &message)
		}
	}
	return messages, strings.Join(systems, "\n\n")
}

func (chat Chat) render(text *template.Template) (string, error) {
	messages, system := chat.joined()
	var out strings.Builder
	err := text.Execute(&out, map[string]any{
		"System": system, "Messages": messages, "Response": "", "ThinkLevel": "",
		"Think": chat.Think != nil && *chat.Think, "IsThinkSet": chat.Think != nil,
	})
	return out.String(), err
}

// tags are the texts that begin and end the last list of nodes in which .Thinking is shown.
func tags(list *parse.ListNode) (found []string) {
	for _, node := range list.Nodes {
		switch node := node.(type) {
		case *parse.ActionNode:
			if node.String() == "{{.Thinking}}" {
				first, last := list.Nodes[0].String(), list.Nodes[len(list.Nodes)-1].String()
				found = []string{strings.TrimSpace(first), strings.TrimSpace(last)}
			}
		case *parse.RangeNode:
			found = append(found, tags(node.List)...)
		case *parse.IfNode:
			found = append(found, tags(node.List)...)
			if node.ElseList != nil {
				found = append(found, tags(node.ElseList)...)
			}
		}
	}
	return found
}

func main() {
	var asked struct {
		Template string
		Chats    []Chat
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	text, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	texts := []string{}
	for _, chat := range asked.Chats {
		shown, err := chat.render(text)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		texts = append(texts, shown)
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{"texts": texts, "tags": tags(text.Tree.Root)})
}
