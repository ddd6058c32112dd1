// A page of another origin that uses the contract's React component as it is.
import { createRoot } from 'react-dom/client';
import { WorkspaceStatus } from 'contract-react';

const id = new URLSearchParams(location.search).get('workspace');
createRoot(document.getElementById('root')!).render(<WorkspaceStatus workspaceId={id!} />);
