// Entry of the bundle codemirror.js: an SQL editor with completion, as the global `SqlEditor`.
import { autocompletion, closeBrackets, completionKeymap } from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap } from "@codemirror/commands";
import { PostgreSQL, sql } from "@codemirror/lang-sql";
import { bracketMatching, HighlightStyle, syntaxHighlighting } from "@codemirror/language";
import { EditorState, Prec } from "@codemirror/state";
import { drawSelection, EditorView, keymap, lineNumbers, placeholder } from "@codemirror/view";
import { tags } from "@lezer/highlight";

const highlight = HighlightStyle.define([
  { tag: tags.keyword, color: "var(--keyword)" },
  { tag: [tags.string, tags.special(tags.string)], color: "var(--string)" },
  { tag: [tags.number, tags.bool, tags.null], color: "var(--number)" },
  { tag: tags.comment, color: "var(--soft)" },
]);

// Complete columns of the tables that the query names, or of all tables if it names none.
function completeColumns(schema) {
  return (context) => {
    const word = context.matchBefore(/[A-Za-z_]\w*/);
    if (!word || context.state.sliceDoc(word.from - 1, word.from) === ".") return null;
    const words = new Set(context.state.doc.toString().match(/\w+/g));
    const named = Object.keys(schema).filter((table) => words.has(table));
    const homes = new Map();
    for (const table of named.length ? named : Object.keys(schema)) {
      for (const column of schema[table]) homes.set(column, [...(homes.get(column) ?? []), table]);
    }
    const options = [...homes].map(([label, tables]) => ({ label, type: "property", detail: tables.slice(0, 3).join(", "), boost: 1 }));
    return { from: word.from, options, validFor: /^\w*$/ };
  };
}

// Options: parent, doc, schema (table -> columns), nonce, label, onRun(), onChange(text).
export function create({ parent, doc, schema, nonce, label, onRun, onChange }) {
  const language = sql({ dialect: PostgreSQL, schema, upperCaseKeywords: false });
  const run = { key: "Mod-Enter", run: () => (onRun(), true) };
  const view = new EditorView({
    parent,
    state: EditorState.create({
      doc,
      extensions: [
        EditorView.cspNonce.of(nonce),
        Prec.highest(keymap.of([run])),
        lineNumbers(),
        history(),
        drawSelection(),
        bracketMatching(),
        closeBrackets(),
        autocompletion(),
        syntaxHighlighting(highlight),
        language,
        language.language.data.of({ autocomplete: completeColumns(schema) }),
        // Tab keeps its meaning of moving on, so that the keyboard can leave the editor.
        keymap.of([...completionKeymap, ...historyKeymap, ...defaultKeymap]),
        EditorView.contentAttributes.of({ "aria-label": label }),
        EditorView.lineWrapping,
        placeholder("select step, avg(entropy) from tokens group by all order by step"),
        EditorView.updateListener.of((update) => update.docChanged && onChange(view.state.doc.toString())),
      ],
    }),
  });
  return {
    get text() { return view.state.doc.toString(); },
    set text(value) { view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: value } }); },
    focus: () => view.focus(),
  };
}
