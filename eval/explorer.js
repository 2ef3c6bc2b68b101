// The explorer of the page of results: filters, search, sorting, keys and links over all questions.
// All text of the data goes through textContent, never into HTML.
"use strict";
(() => {
  for (const pre of document.querySelectorAll("pre.copy")) {
    const button = make("button", "", "copy");
    button.type = "button";
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(pre);
        button.textContent = "selected: press Ctrl-C";
      }
    };
    pre.before(button);
  }

  const source = document.getElementById("questions-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const { runs, questions, kinds, groups, contexts } = data;
  const STEP = 60; // questions that are drawn at once
  const [TEXT, SPAN, EM, F1, KIND, SCORE, WINDOWS, CUT, BEST, ODDS, ERROR] = [...Array(11).keys()];
  const form = document.getElementById("filters");
  const list = document.getElementById("list");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const earlier = document.getElementById("earlier");
  const byId = new Map(questions.map((one, index) => [one.i, index]));
  let shown = []; // indexes of the questions that pass the filters, in order
  let from = 0; // the part of them that is drawn
  let to = 0;
  let current = -1; // the question that is open

  function make(tag, cls, text) {
    const made = document.createElement(tag);
    if (cls) made.className = cls;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function isolated(text, cls) {
    const made = make("bdi", cls, text);
    made.dir = "auto";
    return made;
  }

  // --- filters ---

  function select(name, label, options) {
    const field = make("label", "", label);
    const made = make("select");
    made.name = name;
    for (const [value, text] of options) {
      const one = make("option", "", text);
      one.value = value;
      made.append(one);
    }
    field.append(made);
    form.querySelector(".selects").append(field);
  }

  const states = [["", "all"], ["wrong", "wrong"], ["right", "right"], ["partly", "partly right"]];
  const set = (values) => values.map((text, index) => [String(index), text]);
  if (runs.length > 1) {
    states.push(["differ", "right in some runs only"], ["all-wrong", "wrong in all runs"]);
    runs.forEach((name, index) => states.push([`only-${index}`, `right in ${name} only`]));
    select("run", "Run", [["", "any"], ...set(runs)]);
  }
  states.push(["none", "no answer given"], ["aside", "set aside"]);
  if (data.v2) states.push(["impossible", "has no answer"], ["possible", "has an answer"]);
  select("state", "Show", states);
  select("kind", "Mistake", [["", "any"], ...set(kinds.map(([, label]) => label))]);
  groups.forEach(([title, order], index) => {
    const there = new Set(questions.map((one) => one.g[index]));
    const options = set(order).filter(([value]) => there.has(Number(value)));
    const label = title || "group"; // a column of a CSV file may have no name
    select(`group-${index}`, label[0].toUpperCase() + label.slice(1), [["", "any"], ...options]);
  });
  select("windows", "Windows", [["", "any"], ["1", "one"], ["2", "two or more"]]);
  select("score", "Score", [["", "any"], ...[...Array(10).keys()].map(
    (low) => [String(low), `${low / 10} to ${(low + 1) / 10}`])]);
  select("sort", "Order", [["", "of the data"], ["low", "lowest score first"],
    ["high", "highest score first"], ["f1", "lowest F1 first"], ["long", "longest context first"],
    ["question", "by question"]]);

  function results(one, run) {
    return (run === "" ? one.r : [one.r[run]]).filter(Boolean);
  }

  const tests = {
    wrong: (found) => found.some((each) => !each[EM]),
    right: (found) => found.some((each) => each[EM]),
    partly: (found) => found.some((each) => !each[EM] && each[F1] > 0),
    differ: (found, one) => {
      const every = one.r.filter(Boolean);
      return every.some((each) => each[EM]) && every.some((each) => !each[EM]);
    },
    "all-wrong": (found, one) => one.r.filter(Boolean).every((each) => !each[EM]),
    none: (found) => found.some((each) => each[TEXT] === ""),
    aside: (found) => found.some((each) => each[ERROR] !== null),
    impossible: (found, one) => !one.a.length,
    possible: (found, one) => one.a.length > 0,
  };

  // The texts are put in lower case once, each context once.
  let lowered = null;
  function matches(words) {
    lowered ??= {
      contexts: contexts.map((text) => text.toLowerCase()),
      own: questions.map((one) => [one.i, one.q, ...one.a, ...one.r.map((each) => (each && each[TEXT]) || "")]
        .join("\n").toLowerCase()),
    };
    const inContext = words.map((word) => lowered.contexts.map((text) => text.includes(word)));
    return (index) => words.every((word, place) =>
      lowered.own[index].includes(word) || inContext[place][questions[index].c]);
  }

  function scoreOf(one, run) {
    const scores = results(one, run).map((each) => each[SCORE]).filter((score) => score !== null);
    return scores.length ? Math.min(...scores) : -1;
  }

  function apply() {
    const value = Object.fromEntries(new FormData(form));
    const run = value.run ?? "";
    const words = value.search.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = words.length ? matches(words) : () => true;
    const only = /^only-(\d+)$/.exec(value.state);
    shown = [];
    questions.forEach((one, index) => {
      const found = results(one, run);
      if (!found.length || !fits(index)) return;
      if (only) {
        const others = one.r.filter((each, place) => each && place !== Number(only[1]));
        const own = one.r[only[1]];
        if (!own || !own[EM] || !others.length || others.some((each) => each[EM])) return;
      } else if (value.state && !tests[value.state](found, one)) return;
      if (value.kind && !found.some((each) => each[KIND] === Number(value.kind))) return;
      if (value.windows && !found.some((each) => (each[WINDOWS] > 1 ? "2" : "1") === value.windows)) return;
      if (value.score && !found.some((each) => each[SCORE] !== null
        && Math.min(Math.floor(each[SCORE] * 10), 9) === Number(value.score))) return;
      for (let place = 0; place < groups.length; place++) {
        const wanted = value[`group-${place}`];
        if (wanted && one.g[place] !== Number(wanted)) return;
      }
      shown.push(index);
    });
    const by = {
      low: (one) => scoreOf(one, run),
      high: (one) => -scoreOf(one, run),
      f1: (one) => Math.min(...results(one, run).map((each) => each[F1])),
      long: (one) => -one.l,
      question: (one) => one.q.toLowerCase(),
    }[value.sort];
    if (by) {
      const keys = new Map(shown.map((index) => [index, by(questions[index])]));
      shown.sort((a, b) => (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : a - b));
    }
    count.textContent = `${shown.length.toLocaleString("en")} of ${questions.length.toLocaleString("en")} questions`;
    if (!shown.slice(0, STEP).includes(current)) current = -1;
    draw(0);
    if (current >= 0) showAnswer(element(current));
  }

  // --- the list ---

  function draw(begin) {
    list.replaceChildren();
    from = to = begin;
    grow();
  }

  function grow() {
    const part = shown.slice(to, to + STEP).map(item);
    to += part.length;
    list.append(...part);
    more.hidden = to >= shown.length;
    earlier.hidden = from === 0;
  }

  earlier.onclick = () => {
    const begin = Math.max(from - STEP, 0);
    list.prepend(...shown.slice(begin, from).map(item));
    from = begin;
    earlier.hidden = from === 0;
  };
  more.onclick = grow;
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && to < shown.length) grow();
  }, { rootMargin: "0px 0px 600px" }).observe(more);

  const verdict = (found) => (found[EM] ? "right" : found[F1] > 0 ? "partly" : "wrong");
  const sign = { right: "✓", partly: "◐", wrong: "✗" };

  function item(index) {
    const one = questions[index];
    const made = make("li");
    made.dataset.index = index;
    const head = make("button", "question");
    head.type = "button";
    const marks = make("span", "marks");
    one.r.forEach((found, run) => {
      const kind = found ? verdict(found) : "absent";
      const mark = make("span", kind, found ? sign[kind] : "·");
      mark.title = `${runs[run]}: ${found ? `${kind}, F1 ${Math.round(100 * found[F1])}` : "not asked"}`;
      marks.append(mark);
    });
    const texts = [...new Set(one.r.filter(Boolean).map((found) => said(found)))];
    head.append(marks, isolated(one.q, "asked"), isolated(texts.join(" | "), "said"));
    head.setAttribute("aria-expanded", "false");
    head.onclick = () => (current === index ? close() : open(index));
    made.append(head);
    if (index === current) expand(made, index);
    return made;
  }

  function said(found) {
    if (found[ERROR] !== null) return `set aside: ${found[ERROR]}`;
    return found[TEXT] || "no answer";
  }

  function element(index) {
    return list.querySelector(`li[data-index="${index}"]`);
  }

  function close() {
    const made = element(current);
    if (made) {
      made.querySelector(".detail")?.remove();
      made.classList.remove("open");
      made.firstChild.setAttribute("aria-expanded", "false");
    }
    current = -1;
  }

  function open(index) {
    close();
    current = index;
    const place = shown.indexOf(index);
    if (place < from || place >= to) draw(place - (place % STEP));
    const made = element(index);
    if (!made.classList.contains("open")) expand(made, index);
    showAnswer(made);
    made.firstChild.focus({ preventScroll: true });
    made.scrollIntoView({ block: "nearest" });
    try {
      history.replaceState(null, "", `#${encodeURIComponent(questions[index].i)}`);
    } catch {} // inside of another page, or too often
  }

  function expand(made, index) {
    made.classList.add("open");
    made.firstChild.setAttribute("aria-expanded", "true");
    made.append(detail(questions[index]));
  }

  // A long context has a scrollbar of its own.
  function showAnswer(made) {
    const whole = made.querySelector(".context");
    const first = whole.querySelector("mark, .run");
    if (!first) return;
    const below = first.getBoundingClientRect().top - whole.getBoundingClientRect().top;
    whole.scrollTop = below - whole.clientHeight / 3;
  }

  // --- one question ---

  function detail(one) {
    const made = make("div", "detail");
    made.append(context(one));
    if (one.s.includes(null) || one.r.some((found) => found && found[TEXT] && !found[SPAN])) {
      made.append(make("p", "soft", "Some answers are not in the part of the context that is shown."));
    }
    const right = make("p");
    right.append("Right: ");
    if (one.a.length) {
      one.a.filter((text, place) => one.a.indexOf(text) === place)
        .forEach((text, place) => right.append(place ? " · " : "", isolated(text, "gold")));
    } else right.append("no answer");
    made.append(right);
    const wrap = make("div", "scroll");
    const table = make("table", "runs");
    const head = table.createTHead().insertRow();
    const names = ["run", "answer", "EM", "F1", "score", ...(data.v2 ? ["null odds"] : []),
      "mistake", "windows", "other candidates"];
    for (const name of names) head.append(make("th", "", name));
    const body = table.createTBody();
    one.r.forEach((found, run) => {
      const row = body.insertRow();
      const cell = (...inside) => {
        const made = make("td");
        made.dataset.name = names[row.cells.length];
        made.append(...inside);
        row.append(made);
        return made;
      };
      cell(isolated(runs[run], `run run-${run % 10}`));
      if (!found) return cell("not asked");
      cell(isolated(said(found), verdict(found)));
      cell(String(100 * found[EM]));
      cell((100 * found[F1]).toFixed(1));
      cell(found[SCORE] === null ? "–" : found[SCORE].toFixed(3));
      if (data.v2) cell(found[ODDS] === null ? "–" : found[ODDS].toFixed(2));
      cell(found[KIND] < 0 ? "–" : kinds[found[KIND]][1]).className = "text";
      cell(String(found[WINDOWS]) + (found[CUT] ? ", question cut" : ""));
      const others = cell();
      others.className = "others";
      found[BEST].slice(1).forEach(([begin, end, score, text]) => {
        others.append(isolated(text ?? contexts[one.c].slice(begin, end)), ` ${score.toFixed(3)}`, make("br"));
      });
    });
    wrap.append(table);
    made.append(wrap);
    const link = make("a", "soft", `#${one.i}`);
    link.href = `#${encodeURIComponent(one.i)}`;
    made.append(link);
    return made;
  }

  function context(one) {
    const text = contexts[one.c];
    const spans = one.s.filter(Boolean).map(([begin, end]) => [begin, end, "gold"]);
    one.r.forEach((found, run) => {
      if (found && found[SPAN]) spans.push([...found[SPAN], `run run-${run % 10}`]);
    });
    const ends = [...new Set([0, text.length, ...spans.flatMap(([begin, end]) => [begin, end])])]
      .sort((a, b) => a - b);
    const made = make("p", "context");
    const inside = isolated();
    if (one.m & 1) inside.append("… ");
    for (let place = 0; place + 1 < ends.length; place++) {
      const [begin, end] = [ends[place], ends[place + 1]];
      const over = spans.filter((span) => span[0] <= begin && end <= span[1]).map((span) => span[2]);
      const piece = text.slice(begin, end);
      let node = document.createTextNode(piece);
      for (const cls of [...new Set(over)].reverse()) {
        const mark = make(cls === "gold" ? "mark" : "span", cls);
        mark.append(node);
        node = mark;
      }
      inside.append(node);
    }
    if (one.m & 2) inside.append(" …");
    made.append(inside);
    return made;
  }

  // --- keys and links ---

  function step(by) {
    if (!shown.length) return;
    const at = shown.indexOf(current);
    const next = Math.min(Math.max(at < 0 ? 0 : at + by, 0), shown.length - 1);
    open(shown[next]);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") return typing ? event.target.blur() : close();
    if (typing) return;
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/") form.search.focus();
    else return;
    event.preventDefault();
  });

  function follow() {
    let id = location.hash.slice(1);
    try {
      id = decodeURIComponent(id);
    } catch {} // an id with % in it, written by hand
    const index = byId.get(id);
    if (index === undefined) return;
    if (!shown.includes(index)) {
      form.reset();
      apply();
    }
    open(index);
    element(index).scrollIntoView({ block: "start" });
  }

  function filter(values) {
    form.reset();
    for (const [name, value] of Object.entries(values)) if (form[name]) form[name].value = value;
    apply();
    document.getElementById("section-questions").scrollIntoView();
  }

  for (const link of document.querySelectorAll("[data-filter]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      filter(JSON.parse(link.dataset.filter));
    });
  }
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 120);
  });
  form.querySelector("button[type=reset]").addEventListener("click", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    // Without a change of the address nothing else tells of the click.
    if (link && !event.defaultPrevented && link.hash === location.hash) follow();
  });
  document.getElementById("explorer").hidden = false;
  apply();
  follow();
})();
