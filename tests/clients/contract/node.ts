import { fetch } from 'bun';
async function createWorkspace(name: string) {
const response = await fetch('http://localhost:3100/api/workspaces', {
method: 'POST',
headers: { 'Content-Type': 'application/json' },
body: JSON.stringify({
name,
template: 'bun-typescript',
type: 'persistent'
})
});
return response.json();
}
async function listWorkspaces() {
const response = await fetch('http://localhost:3100/api/workspaces');
return response.json();
}
