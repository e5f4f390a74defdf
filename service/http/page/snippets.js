/* The request as a program: the answer on the page is the answer that it gets. */

const shell = (text) => (/^[\w./:@=%+,-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);
/* curl reads ; and , in a file's name, unless it is quoted. */
const form = (name) => (/[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);
const quote = JSON.stringify;

export const LANGUAGES = ["curl", "Python", "JavaScript"];

/** Return the program that sends `file` to `url` with `fields`. */
export function snippet(language, url, file, fields, needsKey) {
  const entries = Object.entries(fields);
  if (language === "curl") {
    const key = needsKey ? ['-H "Authorization: Bearer $VITRINE_KEY"'] : [];
    return ["curl", ...key, `-F ${shell(`image=@${form(file)}`)}`, ...entries.map(([k, v]) => `-F ${shell(`${k}=${v}`)}`), shell(url)].join(" \\\n  ");
  }
  if (language === "Python") {
    const lines = [`    ${quote(url)},`, `    files={"image": open(${quote(file)}, "rb")},`];
    lines.push(`    data={${entries.map(([k, v]) => `${quote(k)}: ${quote(v)}`).join(", ")}},`);
    if (needsKey) lines.push('    headers={"Authorization": f"Bearer {key}"},');
    return `import requests\n\nresponse = requests.post(\n${lines.join("\n")}\n)\nresponse.raise_for_status()\nprint(response.json())`;
  }
  const headers = needsKey ? ", headers: { Authorization: `Bearer ${key}` }" : "";
  const appended = entries.map(([k, v]) => `form.append(${quote(k)}, ${quote(String(v))});\n`).join("");
  return `const form = new FormData();\nform.append("image", file); // from <input type="file">\n${appended}` +
    `const response = await fetch(${quote(url)}, { method: "POST", body: form${headers} });\n` +
    "if (!response.ok) throw new Error((await response.json()).error.message);\nconsole.log(await response.json());";
}
