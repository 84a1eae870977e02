package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/owner"
)

// completeVerb is the command that the shells' functions call: it gets the words of a command line up to the cursor, the
// last of them unfinished, and prints what it may become. Behind a tab, it says what that is. If it prints nothing, the
// word is the name of a file, or anything.
const completeVerb = "__complete"

// completions are the functions of the shells.
var completions = map[string]string{
	// Bash cuts words at characters such as @, : and =, so the line is cut again, at spaces, and the part of the last word
	// that bash has cut off is taken off the answers, too.
	"bash": `_vdisk() {
    local line=${COMP_LINE:0:COMP_POINT} words cur answers cut
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    cur=${words[-1]}
    mapfile -t answers < <("${words[0]}" ` + completeVerb + ` "${words[@]:1}" 2>/dev/null | cut -f 1)
    cut=${cur%"${cur##*[$COMP_WORDBREAKS]}"}
    COMPREPLY=("${answers[@]#"$cut"}")
    [[ ${#answers[@]} == 1 && ${answers[0]} == *[@=] ]] && compopt -o nospace
}
complete -o default -F _vdisk vdisk
`,
	"zsh": `#compdef vdisk
_vdisk() {
    local -a answers
    answers=("${(@f)$("${words[1]}" ` + completeVerb + ` "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z $answers ]]; then
        _files
        return
    fi
    local -a plain=("${(@)answers%%$'\t'*}") shown=("${(@)answers/$'\t'/  -- }") after=()
    [[ $#plain == 1 && $plain == *@ ]] && after=(-S '')
    compadd -l $after -d shown -a plain
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _vdisk "$@"
else
    compdef _vdisk vdisk
fi
`,
	"fish": `function __vdisk_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l answers ($words[1] ` + completeVerb + ` $words[2..] 2>/dev/null)
    if test (count $answers) = 0
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $answers
    end
end
complete -c vdisk -f -a '(__vdisk_complete)'
`,
}

func (a *app) completionCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "completion",
		Category:  groupMaintenance,
		Usage:     "print a shell's completion of commands, flags, volumes and snapshots",
		UsageText: "vdisk completion bash|zsh|fish",
		Description: "bash: vdisk completion bash > /etc/bash_completion.d/vdisk\n" +
			"zsh:  vdisk completion zsh > /usr/local/share/zsh/site-functions/_vdisk\n" +
			"fish: vdisk completion fish > /etc/fish/completions/vdisk.fish",
	}, func(c *cli.Context) error {
		text, ok := completions[c.Args().First()]
		if !ok {
			return usageError{c, fmt.Errorf("%q: bash, zsh and fish are possible", c.Args().First())}
		}
		_, err := io.WriteString(a.stdout, text)
		return err
	})
}

// completeCommand prints what the last of its arguments may become. It changes nothing, and fails for nothing: without a
// store, or with one that is busy, there are no names.
func (a *app) completeCommand() *cli.Command {
	return &cli.Command{Name: completeVerb, Hidden: true, SkipFlagParsing: true, Action: func(c *cli.Context) error {
		words := c.Args().Slice()
		if len(words) == 0 {
			words = []string{""}
		}
		before, typed := words[:len(words)-1], words[len(words)-1]
		if dir := storeIn(before); dir != "" {
			a.dir = dir
		}
		command, positional, flag := parsedWords(c.App, before)
		for _, answer := range a.answers(c, command, positional, flag, typed) {
			if strings.HasPrefix(answer, typed) {
				if _, err := fmt.Fprintln(a.stdout, answer); err != nil {
					return err
				}
			}
		}
		return nil
	}}
}

// parsedWords returns the command in words, if there is one, how many arguments it has, and the flag that waits for its
// value.
func parsedWords(program *cli.App, words []string) (command *cli.Command, positional int, flag string) {
	flags := flagTable(program.Flags)
	for _, w := range words {
		switch name, _, hasValue := strings.Cut(strings.TrimLeft(w, "-"), "="); {
		case flag != "":
			flag = ""
		case strings.HasPrefix(w, "-") && w != "-":
			if flags.takesValue(w, name) && !hasValue {
				flag = name
			}
		case command != nil:
			positional++
		case w != "help":
			if command = program.Command(w); command != nil {
				flags.add(command.Flags...)
			}
		}
	}
	return command, positional, flag
}

// answers are all words that may come next.
func (a *app) answers(c *cli.Context, command *cli.Command, positional int, flag, typed string) []string {
	switch {
	case flag != "":
		return valuesOf[flag]
	case strings.HasPrefix(typed, "-"):
		return flagsOf(c.App, command)
	case command == nil:
		var all []string
		for _, c := range c.App.VisibleCommands() {
			all = append(all, c.Name+"\t"+c.Usage)
		}
		return all
	}
	if words, ok := wordsOf[command.Name]; ok && positional == 0 {
		return words
	}
	return a.names(c, argumentOf(command.UsageText, positional), typed)
}

// valuesOf are the values that flags may have, unless those are names of files, numbers or the like.
var valuesOf = map[string][]string{
	"compress": {format.Raw.String(), format.S2.String(), format.Zstd.String()},
	"type":     {"vol", "snap", "all"}, "t": {"vol", "snap", "all"},
	"columns": columnNames(), "o": columnNames(), "sort": columnNames(),
	"color":         {colorAlways, colorAuto, colorNever},
	"logical-block": {"512", "4096"},
	"output":        {"human", "json"},
}

// wordsOf are the words that are the first argument of a command.
var wordsOf = map[string][]string{
	"completion": {"bash", "fish", "zsh"},
	"metadata":   {"dump", "rebuild", "restore"},
	"stream":     {"check", "info"},
	"create":     {}, // a name that is new
}

func flagsOf(program *cli.App, command *cli.Command) (all []string) {
	flags := slices.Clone(program.Flags)
	if command != nil {
		flags = append(flags, command.Flags...)
	}
	for _, f := range append(flags, cli.HelpFlag) {
		usage := ""
		if d, ok := f.(cli.DocGenerationFlag); ok {
			usage = strings.ReplaceAll(d.GetUsage(), "`", "")
		}
		for _, name := range f.Names() {
			if len(name) > 1 {
				all = append(all, "--"+name+"\t"+usage)
			}
		}
	}
	return all
}

// completeWithin is how long a completion waits for the store: people wait for it at the keyboard.
const completeWithin = time.Second

// argumentOf returns what the usage text of a command calls its n-th argument, counted from 0, or "". An argument with
// dots behind it may come again and again.
func argumentOf(usage string, n int) string {
	// Of several forms, the first. Within brackets, there are several flags.
	if form, _, several := strings.Cut(usage, " | "); several && strings.Count(form, "[") == strings.Count(form, "]") {
		usage = form
	}
	words := strings.Fields(usage)
	flag := 0                                         // how many brackets are open since the one of a flag
	for _, word := range words[min(2, len(words)):] { // behind the names of the program and the command
		opens, closes := strings.Count(word, "["), strings.Count(word, "]")
		if flag > 0 || strings.HasPrefix(word, "[-") {
			flag += opens - closes
			continue
		}
		if strings.HasPrefix(word, "-") {
			continue
		}
		if n == 0 || strings.HasSuffix(strings.TrimRight(word, "]"), "...") {
			return word
		}
		n--
	}
	return ""
}

// names returns the volumes, or with an @ in typed their snapshots, if argument stands for some.
func (a *app) names(c *cli.Context, argument, typed string) (all []string) {
	if !strings.Contains(argument, "VOL") && argument != "A" && argument != "B" {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.Context, completeWithin)
	defer cancel()
	o := a.options(c)
	o.Look, o.LockTimeout, o.Logger = true, completeWithin, slog.New(slog.DiscardHandler)
	s, err := owner.Open(ctx, a.dir, o)
	if err != nil {
		return nil
	}
	defer func() { _ = s.Close() }() // a look changes nothing
	volumes, err := s.Volumes(ctx)
	if err != nil {
		return nil
	}
	snapshots := strings.Contains(argument, "VOL@") // and nothing else
	volume, _, at := strings.Cut(typed, "@")
	for _, v := range volumes {
		switch {
		case at && v.Name == volume:
			for _, sn := range v.Snapshots {
				all = append(all, v.Name+"@"+sn.Name)
			}
		case at:
		case snapshots:
			all = append(all, v.Name+"@")
		default:
			all = append(all, v.Name)
		}
	}
	return all
}

// storeIn returns the value of --store in words, or "".
func storeIn(words []string) string {
	for i, w := range words {
		if dir, ok := strings.CutPrefix(w, "--store="); ok {
			return dir
		}
		if w == "--store" && i+1 < len(words) {
			return words[i+1]
		}
	}
	return ""
}
